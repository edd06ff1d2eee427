"""Sources of images: class folders, tables of paths, arrays, TFDS, Hugging Face, digits; and which rows are kept."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer.data import DataError, DataSpec, from_records, images, read
from tests.data import pictures

COLUMNS = ("image", "label")
PNG = pictures.encoded(pictures.noise())


def tree(root, *names, content=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def images_of(dataset):
    return images.examples(dataset, images.ImageProcessor(resize=(4, 4)), labels={})


# Folders


def test_class_folders(tmp_path):
    path = tree(tmp_path, "cat/10.png", "cat/9.JPG", "dog/a/x.webp", "class 2/y.gif", "class 10/z.tif", "cat/.DS_Store",
                "cat/notes.txt", "README", ".git/a.png")  # fmt: skip
    dataset = read(path, COLUMNS)
    found = [(row["image"].relative_to(path).as_posix(), row["label"]) for row in (dataset[i] for i in range(5))]
    assert found == [
        ("cat/9.JPG", "cat"), ("cat/10.png", "cat"), ("class 2/y.gif", "class 2"), ("class 10/z.tif", "class 10"),
        ("dog/a/x.webp", "dog"),
    ]  # fmt: skip
    assert dataset.classes("label") == ("cat", "class 2", "class 10", "dog")
    assert dataset.notes == (f"{path}: passed over 3 files that are no images",)
    assert len(images_of(dataset)) == 5


def test_folder_without_labels(tmp_path):
    """To predict: images wherever they lie."""
    path = tree(tmp_path, "b.png", "a/c.png")
    assert [row.values["image"].name for row in read(path, ("image",)).rows] == ["c.png", "b.png"]


def test_digest_of_a_folder(tmp_path):
    path = tree(tmp_path, "a/1.png", "b/2.png")
    digest = read(path, COLUMNS).digest
    assert read(path, COLUMNS).digest == digest
    moved = tmp_path / "b/2.png"
    moved.rename(tmp_path / "a/2.png")
    tree(tmp_path, "b/2.png", content=PNG + b"x")
    assert read(path, COLUMNS).digest != digest


FOLDERS = {
    "holds no images": ("a/notes.txt",),
    r"/b: a class folder without images \(\.png": ("a/1.png", "b/notes.txt"),
    "/1.png: lies beside the class folders, so it has no label": ("1.png", "a/1.png"),
}


@pytest.mark.parametrize("message", FOLDERS)
def test_bad_folders(message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tree(tmp_path, *FOLDERS[message]), COLUMNS)


def test_folder_options(tmp_path):
    path = tree(tmp_path, "a/1.png")
    with pytest.raises(DataError, match="no column 'text'; it has image, label"):
        read(path)
    with pytest.raises(DataError, match="is a folder of images; format, delimiter and pattern are for files"):
        read(DataSpec(path, format="csv"), COLUMNS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        read(str(tmp_path / "empty"), COLUMNS)


# Tables of paths

TABLES = {
    "a.csv": "image,label\nx/1.png,good\n../2.png,bad\n",
    "a.tsv": "label\timage\ngood\tx/1.png\nbad\t../2.png\n",
    "a.jsonl": '{"image": "x/1.png", "label": "good"}\n{"image": "../2.png", "label": "bad"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_paths_are_relative_to_the_file(name, tmp_path):
    tree(tmp_path, "2.png", "lists/x/1.png")
    table = tmp_path / "lists" / name
    table.write_text(TABLES[name])
    dataset = read(str(table), COLUMNS)
    assert [row.values["image"].resolve() for row in dataset.rows] == [
        (tmp_path / "lists/x/1.png").resolve(), tmp_path.resolve() / "2.png",
    ]  # fmt: skip
    assert len(images_of(dataset)) == 2
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images cannot be used: .*2\.png cannot be read: No such file"):
        images_of(dataset)


def test_an_empty_path_has_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("image,label\n,good\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2 is '', expected a path"):
        images_of(read(str(tmp_path / "a.csv"), COLUMNS))


def test_parquet_holds_paths_or_bytes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tree(tmp_path, "1.png")
    values = {"path": ["1.png"], "bytes": [PNG], "record": [{"bytes": PNG, "path": None}]}
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    for column in values:
        dataset = read(DataSpec(str(tmp_path / "a.parquet"), columns={"image": column}), ("image",))
        assert images_of(dataset).lazy(0, (0, 0))["pixel_values"].shape == (4, 4, 3)


# Arrays


def medmnist(path, **arrays):
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (5, 8, 8), dtype=np.uint8),
        "train_labels": np.array([[0], [1], [0], [2], [1]], np.uint8),
        "val_images": rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8),
        "val_labels": np.array([[0, 1, 1], [0, 0, 0]]),
    }
    np.savez_compressed(path, **made | arrays)
    return str(path)


def test_npz(tmp_path):
    path = medmnist(tmp_path / "a.npz", names=np.array(["a", "b", "a", "c", "b"]))
    with pytest.raises(DataError, match="no column 'image'; it has train_images, train_labels, val_images, val_labels"):
        read(path, COLUMNS)
    train = read(DataSpec(path, columns={"image": "train_images", "label": "train_labels"}), COLUMNS)
    assert train.class_ids("label", ("x", "y", "z")).tolist() == [0, 1, 0, 2, 1]
    assert train[3]["image"].shape == (8, 8)
    named = read(DataSpec(path, columns={"image": "train_images", "label": "names"}), COLUMNS)
    assert named.classes("label") == ("a", "b", "c")
    several = read(DataSpec(path, columns={"image": "val_images", "label": "val_labels"}), COLUMNS)
    assert several.multi_hot("label", ("x", "y", "z")).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert several.classes("label", multi_label=True) == ("0", "1", "2")
    with pytest.raises(DataError, match="its arrays differ in their length"):
        read(DataSpec(path, columns={"image": "train_images", "label": "val_labels"}), COLUMNS)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 of a kind", b"\x93NUMPY"])
def test_no_npz(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: is no npz"):
        read(str(tmp_path / "a.npz"), COLUMNS)


def test_npz_runs_no_code(tmp_path):
    path = medmnist(tmp_path / "a.npz", train_images=np.array([{}, {}, {}, {}, {}], object))
    with pytest.raises(DataError, match="is no npz: Object arrays cannot be loaded"):
        read(DataSpec(path, columns={"image": "train_images", "label": "train_labels"}), COLUMNS)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match="holds one array without a name"):
        read(str(tmp_path / "one.npz"), COLUMNS)


def test_digits(monkeypatch):
    pytest.importorskip("sklearn")
    dataset = read("packaged:digits", COLUMNS)
    assert (len(dataset), dataset.classes("label")) == (1797, tuple("0123456789"))
    assert dataset[0]["image"].dtype == np.uint8
    assert (dataset[0]["image"].min(), max(dataset[i]["image"].max() for i in range(9))) == (0, 255)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"needs the package scikit-learn: pip install 'jaxtransfer\[demo\]'"):
        read("packaged:digits", COLUMNS)


# Catalogues


@pytest.fixture
def prepared(tmp_path):
    """A tiny TFDS data set of images, prepared as ArrayRecord."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            classes = tfds.features.ClassLabel(names=["cat", "dog", "elk"])
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "depth": tfds.features.Image(shape=(None, None, 1)),
                "label": classes,
                "all": tfds.features.Sequence(classes),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                image = io.BytesIO(pictures.encoded(pictures.noise(seed=i)))
                yield i, {"image": image, "depth": io.BytesIO(PNG), "label": i % 2, "all": [0, 2][: i % 3]}

    builder = TinyPictures(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return f"tfds:{builder.data_path}:train"


@pytest.mark.filterwarnings("default")  # preparing is foreign code
def test_tfds(prepared):
    dataset = read(prepared, COLUMNS)
    assert "tensorflow" not in sys.modules
    assert dataset.classes("label") == ("cat", "dog")
    stored = {pictures.encoded(pictures.noise(seed=i)) for i in range(4)}
    assert {row.values["image"] for row in dataset.rows} == stored
    assert len(images_of(dataset)) == 4
    several = read(DataSpec(prepared, columns={"label": "all"}), COLUMNS)
    assert several.classes("label", multi_label=True) == ("cat", "elk")
    assert several.multi_hot("label", ("cat", "dog", "elk")).sum(0).tolist() == [2, 0, 1]
    about = Path(prepared.split(":")[1], "features.json")  # without TensorFlow floats can be read, but not written
    depth = json.loads(about.read_text())
    depth["featuresDict"]["features"]["depth"]["image"]["dtype"] = "float32"
    about.write_text(json.dumps(depth))
    with pytest.raises(DataError, match="depth holds images of floats; images are 8 bits a channel"):
        read(DataSpec(prepared, columns={"image": "depth"}), COLUMNS)


def test_hugging_face(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"img": [{"bytes": PNG, "path": None}], "label": [1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    dataset = read(DataSpec("hf:owner/pets:train", columns={"image": "img"}), COLUMNS)
    assert dataset[0] == {"image": PNG, "label": "dog"}


# Selections


def of_classes(folder):
    """Ten rows of "a", six of "b", four of 7."""
    rows = [(i, "a" if i < 10 else "b" if i < 16 else 7) for i in range(20)]
    path = folder / "a.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{label}\n" for i, label in rows))
    return str(path)


def test_only(tmp_path):
    path = of_classes(tmp_path)
    dataset = read(DataSpec(path, only=("7", "b")))
    assert [dataset[i]["label"] for i in range(10)] == ["b"] * 6 + ["7"] * 4
    assert dataset.notes == (f"{path}: kept 10 of 20 rows, of the labels 7, b",)
    with pytest.raises(DataError, match="only: no row has the label 'c'; there are 7, a, b"):
        read(DataSpec(path, only=("a", "c")))
    with pytest.raises(DataError, match="only: names a label twice"):
        DataSpec(path, only=("a", "a"))


def test_per_class(tmp_path):
    path = of_classes(tmp_path)
    order = np.random.RandomState(3).permutation(20)
    dataset = read(DataSpec(path, per_class=2, seed=3))
    want = [i for low, high in ((0, 10), (10, 16), (16, 20)) for i in [j for j in order if low <= j < high][:2]]
    assert dataset.strings("text") == [f"t{i}" for i in order if i in want]
    assert dataset.notes == (f"{path}: kept 6 of 20 rows, 2 of each label",)
    wider = read(DataSpec(path, per_class=4, seed=3))
    assert set(dataset.strings("text")) < set(wider.strings("text"))
    inside = read(DataSpec(path, only=("a",), split=(0, 5), per_class=3, seed=3))
    ten = np.random.RandomState(3).permutation(10)
    assert inside.strings("text") == [f"t{i}" for i in ten[:3]]
    with pytest.raises(DataError, match="per_class: 5 rows of '7' are wanted, there are 4"):
        read(DataSpec(path, per_class=5))
    with pytest.raises(DataError, match="per_class: must be at least 1"):
        DataSpec(path, per_class=0)
    with pytest.raises(DataError, match="only and per_class: select by the column label, which is not read here"):
        read(DataSpec(path, per_class=1), ("text",))


def test_the_same_image_by_its_bytes(tmp_path):
    """Whatever its name, and whether a file or an array that numpy would abbreviate."""
    train = tree(tmp_path / "train", "a/1.png", "b/2.png")
    tree(tmp_path / "train", "b/3.png", content=pictures.encoded(pictures.noise(seed=5)))
    test = tree(tmp_path / "test", "a/9.png")
    assert [row.values["image"].name for row in read(DataSpec(train, unique=True), COLUMNS).rows] == ["1.png", "3.png"]
    assert [row.values["image"].name for row in read(DataSpec(train, without=test), COLUMNS).rows] == ["3.png"]
    large = np.zeros((3, 60, 60), np.uint8)
    large[1, 30, 30] = 1
    path = medmnist(tmp_path / "a.npz", big=large, ids=np.arange(3))
    assert len(read(DataSpec(path, unique=True, columns={"image": "big", "label": "ids"}), COLUMNS)) == 2
    assert from_records([{"image": large[0]}]).digest != from_records([{"image": large[1]}]).digest


# Several labels


def test_multi_hot():
    values = ["cat| dog", "", ["elk"], [], (0, 1, 1), np.array([1.0, 0, 0]), "elk", 1]
    dataset = from_records([{"label": value} for value in values])
    hot = dataset.multi_hot("label", ("cat", "dog", "elk"))
    assert hot.dtype == np.float32
    assert hot.tolist() == [
        [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0],
    ]  # fmt: skip
    named = from_records([{"label": value} for value in values[:4]])
    assert named.classes("label", multi_label=True) == ("cat", "dog", "elk")


LABELS = {
    "record 0: label 'cow' is unknown; known: cat, dog": "cat|cow",
    "record 0: label 'emu' is unknown": ["emu"],
    "record 0: label has 3 values for 2 labels": [0, 1, 0],
    r"record 0: label is \[0, 2\], expected names, or a vector of 0 and 1": [0, 2],
    "record 0: label is None, expected a name": None,
    r"record 0: label is \['cat', 1\], expected names": ["cat", 1],
}


@pytest.mark.parametrize("message", LABELS)
def test_bad_labels(message):
    with pytest.raises(DataError, match=message):
        from_records([{"label": LABELS[message]}]).multi_hot("label", ("cat", "dog"))


# Real sets: file, arrays, rows, shape, classes, kinds of images

REAL = {
    "pneumoniamnist.npz": ("train_images", "train_labels", 3882, (28, 28), 2, "grey, repeated in three channels"),
    "usps.npz": ("test_images", "test_labels", 2007, (16, 16), 10, "of floats, rounded to 8 bits"),
    "cifar10_5000_2000.npz": ("x_test", "y_test", 2000, (32, 32), 10, None),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_sets(name, data_root):
    pixels, labels, rows, size, classes, note = REAL[name]
    spec = DataSpec(str(data_root / "images" / name), columns={"image": pixels, "label": labels})
    dataset = read(spec, COLUMNS)
    assert (len(dataset), len(dataset.classes("label"))) == (rows, classes)
    examples = images.examples(dataset, images.ImageProcessor(), labels={})
    assert (len(examples), examples.lazy.processor.size) == (rows, size)
    assert note is None or any(f"{rows} of {rows} images are {note}" in told for told in examples.notes)
