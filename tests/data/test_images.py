"""Images: prepared as transformers does, checked once, decoded batch by batch, and the same whoever decodes them."""

import dataclasses
import io
import json
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from jaxtransfer.data import DataError, batches, from_records, images, read
from jaxtransfer.data.images import Augment, ImageProcessor
from tests.data import pictures

PLAIN = ImageProcessor(resize=(8, 6))
VARIED = Augment(crop_scale=(0.5, 1.0), pad=1, flip=True, rotate=10.0, brightness=0.2, contrast=0.2, erase=0.5)


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def made(values, processor=PLAIN, **options):
    """Examples of images in memory, with their numbers for labels."""
    dataset = from_records([{"image": value} for value in values])
    return images.examples(dataset, processor, **{"labels": {"labels": np.arange(len(values))}} | options)


def pixels(value, processor=PLAIN):
    return made([value], processor).lazy(0, (0, 0))["pixel_values"]


# The processor

CLASSES = {
    "ViT": {"size": {"height": 21, "width": 17}},
    "ViT, as it is": {"do_resize": False, "rescale_factor": 0.01, "do_normalize": False},
    "ViT, not rescaled": {"size": {"height": 9, "width": 9}, "do_rescale": False, "resample": 0},
    "DeiT": {"size": {"height": 25, "width": 20}, "crop_size": {"height": 20, "width": 17}},
    "Bit": {"size": {"shortest_edge": 25}, "crop_size": {"height": 20, "width": 17}},
    "Bit, padded": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 20}},
    "ConvNext": {"size": {"shortest_edge": 384}},
    "ConvNext, cut": {"size": {"shortest_edge": 31}, "crop_pct": 0.9},
}


@pytest.mark.parametrize("case", CLASSES)
def test_transformers_processors(case, tmp_path):
    name = case.partition(",")[0]
    module = pytest.importorskip(f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}")
    theirs = getattr(module, f"{name}ImageProcessorPil")(**CLASSES[case])
    theirs.save_pretrained(tmp_path)
    ours = images.processor(pictures.source(tmp_path, (tmp_path / "preprocessor_config.json").read_text()))
    for shape in ((40, 33), (23, 61), (28, 28)):
        image = Image.fromarray(pictures.noise(*shape, seed=shape[0]))
        want = theirs(image)["pixel_values"][0].transpose(1, 2, 0)
        got = ours(image)
        assert got.dtype == np.float32
        assert ours.size in (None, got.shape[:2])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


WRITTEN = {
    "squeezed": ImageProcessor(resize=(21, 17), mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4), resample="bicubic"),
    "cut": ImageProcessor(resize=25, crop=(20, 17)),
    "cut, squeezed before": ImageProcessor(resize=(25, 20), crop=(20, 17), resample="lanczos"),
    "cut alone": ImageProcessor(crop=(20, 60), rescale=0.01),
    "as it is": ImageProcessor(mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0),
    "one channel": ImageProcessor(channels=1, resize=(21, 17), mean=(0.3,), std=(0.2,)),
}


@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_is_what_transformers_reads(case, tmp_path):
    """With Pillow: its other backend resizes in its own way."""
    transformers, how = pytest.importorskip("transformers"), WRITTEN[case]
    source = pictures.source(tmp_path, how.fields, num_channels=how.channels)
    assert images.processor(source) == how
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for shape in ((40, 33), (23, 61)):
        image = Image.fromarray(pictures.noise(*shape, channels=how.channels, seed=shape[0]))
        want = theirs(image)["pixel_values"][0]
        np.testing.assert_allclose(how(image), np.asarray(want).transpose(1, 2, 0), rtol=0, atol=1e-6)


def test_pixels_by_hand():
    """Grey, cropped from 3 x 3 to 1 x 5: the middle row between black columns."""
    grey = np.array([[0, 0, 0], [51, 102, 255], [0, 0, 0]], np.uint8)
    how = ImageProcessor(channels=1, crop=(1, 5), mean=(0.2,), std=(0.4,))
    np.testing.assert_allclose(pixels(grey, how)[0, :, 0], [-0.5, 0.0, 0.5, 2.0, -0.5], atol=1e-7)


STATS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Files as they lie on the hub, older than the fields that transformers writes today.
OLD = {
    "vit": ({"do_normalize": True, "do_resize": True, "size": 224, **STATS}, {"resize": (224, 224)}),
    "resnet": (
        {"crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3, "size": 224, **STATS},
        {"resize": 256, "crop": (224, 224), "resample": "bicubic"},
    ),
    "deit": (
        {"feature_extractor_type": "DeiTFeatureExtractor", "crop_size": 224, "resample": 3, "size": 256, **STATS},
        {"resize": (256, 256), "crop": (224, 224), "resample": "bicubic"},
    ),
    "dinov2": (
        {"crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True, "size": {"shortest_edge": 256}, **STATS},
        {"resize": 256, "crop": (224, 224), "resample": "bicubic"},
    ),
}


@pytest.mark.parametrize("family", OLD)
def test_files_of_the_hub(family, tmp_path):
    fields, want = OLD[family]
    got = images.processor(pictures.source(tmp_path, fields, family, num_channels=3))
    want = ImageProcessor(mean=tuple(STATS["image_mean"]), std=tuple(STATS["image_std"]), **want)
    assert got == want


REFUSED = {
    "field do_pad=True is not supported": {"do_pad": True},
    "field do_flip_channel_order=True": {"do_flip_channel_order": True},
    "field auto_map=": {"auto_map": {"AutoImageProcessor": "code.py"}},
    "image_processor_type 'FlavaImageProcessor' is not supported; known: ViT": {
        "image_processor_type": "FlavaImageProcessor"
    },
    r"size=\{'longest_edge': 9\} is not supported": {"size": {"longest_edge": 9}},
    "resample=7 is not supported": {"resample": 7},
    "lacks the field size": {"size": ...},
    "lacks the field image_std": {"image_std": ...},
    "lacks the field crop_size": {"do_center_crop": True},
    "mean: has 2 different values, the model takes 3 channels; set mean": {"image_mean": [0.1, 0.2]},
    "a shorter side of 9 without a centre crop fixes no size": {"size": {"shortest_edge": 9}},
    "std: must be positive": {"image_std": [0.1, 0.0, 0.1]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_fields(message, tmp_path):
    fields = {"image_processor_type": "ViTImageProcessor", "size": 9, "do_center_crop": False, **STATS}
    fields = {name: value for name, value in (fields | REFUSED[message]).items() if value is not ...}
    with pytest.raises(DataError, match=message) as caught:
        images.processor(pictures.source(tmp_path, fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_no_json(text, tmp_path):
    with pytest.raises(DataError, match=r"tiny: preprocessor_config\.json: (cannot be read|expected one JSON object)"):
        images.processor(pictures.source(tmp_path, text))


def test_without_a_file():
    """The model's size and channels, and a note that says what was left open."""
    how = images.processor(pictures.source(image_size=(30, 20), num_channels=1))
    assert (how.size, how.channels, how.mean, how.std) == ((30, 20), 1, (0.5,), (0.5,))
    assert "no preprocessor_config.json; images are taken at 30 x 20, with mean and std 0.5" in how.notes[0]
    assert images.processor(pictures.source()).size is None
    told = images.processor(pictures.source(), size=(4, 5), mean=0.1, std=(0.2, 0.3, 0.4))
    assert (told.size, told.mean, told.std, told.notes) == ((4, 5), (0.1,) * 3, (0.2, 0.3, 0.4), ())


def test_what_is_set_goes_before_the_file(tmp_path):
    fields = {"size": {"shortest_edge": 256}, "crop_size": 224, "image_processor_type": "BitImageProcessor", **STATS}
    source = pictures.source(tmp_path, fields, num_channels=3)
    how = images.processor(source, size=32, mean=[0.1, 0.2, 0.3], resample="box")
    assert (how.resize, how.crop, how.size) == (37, (32, 32), (32, 32))
    assert (how.mean, how.std, how.resample) == ((0.1, 0.2, 0.3), tuple(STATS["image_std"]), "box")
    with pytest.raises(DataError, match="channels: 1, but the model takes 3"):
        images.processor(source, channels=1)
    with pytest.raises(DataError, match="mean: has 3 different values, the model takes 1 channels"):
        images.processor(pictures.source(tmp_path, fields, num_channels=1))
    with pytest.raises(DataError, match="resample: must be one of nearest"):
        images.processor(source, resample="cubic")
    with pytest.raises(DataError, match="size: must be positive"):
        images.processor(source, size=0)


# Images that can be used

RGB, GREY = pictures.noise(), pictures.noise(channels=1)
OPAQUE = np.concatenate([RGB, np.full((12, 9, 1), 255, np.uint8)], -1)
TURNED = Image.Exif()
TURNED[0x0112] = 6
GOOD = {
    "png": (pictures.encoded(RGB), RGB, ""),
    "array": (RGB, RGB, ""),
    "Hugging Face's record": ({"bytes": pictures.encoded(RGB), "path": None}, RGB, ""),
    "one channel": (GREY[..., None], np.repeat(GREY[..., None], 3, -1), "grey, repeated in three channels"),
    "grey png": (pictures.encoded(GREY), np.repeat(GREY[..., None], 3, -1), "grey, repeated in three channels"),
    "floats": (RGB / np.float32(255), RGB, "of floats, rounded to 8 bits"),
    "opaque": (pictures.encoded(OPAQUE), RGB, "with an alpha channel that is opaque, dropped"),
    "opaque array": (OPAQUE, RGB, "with an alpha channel that is opaque, dropped"),
    "two colours": (
        pictures.encoded(Image.fromarray(GREY > 99)),
        np.repeat((GREY > 99)[..., None] * np.uint8(255), 3, -1),
        "grey, repeated in three channels",
    ),
    "palette": (
        pictures.encoded(Image.fromarray(RGB).quantize(7)),
        np.asarray(Image.fromarray(RGB).quantize(7).convert("RGB")),
        "with a palette, looked up",
    ),
    **{
        f"frames, {kind}": (
            pictures.encoded(RGB, kind, save_all=True, append_images=[Image.fromarray(255 - RGB)], **options),
            RGB,
            "of several frames, the first is taken",
        )
        for kind, options in {"TIFF": {}, "PNG": {}, "WEBP": {"lossless": True}}.items()
    },
    "frames, GIF": (
        pictures.encoded(Image.fromarray(GREY > 99), "GIF", save_all=True, append_images=[Image.fromarray(GREY < 99)]),
        np.repeat((GREY > 99)[..., None] * np.uint8(255), 3, -1),
        "of several frames, the first is taken; grey, repeated in three channels",
    ),
    "turned": (pictures.encoded(RGB, exif=TURNED), np.rot90(RGB, -1), "turned upright as its EXIF says"),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_images(case):
    value, want, note = GOOD[case]
    as_is = ImageProcessor(rescale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    examples = made([value, value], as_is)
    np.testing.assert_array_equal(examples.lazy(1, (0, 0))["pixel_values"], want)
    told = {text.partition("images are ")[2] for text in examples.notes}
    assert told == {part for part in note.split("; ") if part}
    assert all(text.startswith("records: 2 of 2 images are ") for text in examples.notes)


def test_one_channel():
    how = ImageProcessor(channels=1, mean=(0.0,), std=(1.0,), rescale=1.0)
    np.testing.assert_array_equal(pixels(GREY, how)[..., 0], GREY)
    with pytest.raises(DataError, match="has 3 channels, the model takes 1; set channels: 1 to turn colour into grey"):
        pixels(RGB, how)
    asked = images.processor(pictures.source(num_channels=1), channels=1)
    assert asked.grey
    luma = np.asarray(Image.fromarray(RGB).convert("L"))
    np.testing.assert_array_equal(pixels(RGB, dataclasses.replace(how, grey=asked.grey))[..., 0], luma)


# Images that cannot

ARRAYS = {
    r"record 1 has the shape \(3, 12, 9\), expected \(H, W\) or \(H, W, C\)": np.zeros((3, 12, 9), np.uint8),
    r"has the shape \(0, 9\)": np.zeros((0, 9), np.uint8),
    "is uint16, expected uint8": np.zeros((4, 4), np.uint16),
    r"holds floats from 0 to 255; they must lie in 0 to 1": np.array([[0.0, 255.0]]),
    "holds floats from": np.array([[0.0, np.nan]]),
    "records, record 1 is None, expected a path, bytes or an array": None,
    "records, record 1 is ' ', expected a path": " ",
    "nowhere.png cannot be read: No such file": "nowhere.png",
    "record 1 is empty, it has no bytes": b"",
}


@pytest.mark.parametrize("message", ARRAYS)
def test_bad_values(message):
    with pytest.raises(DataError, match=f"1 of 2 images cannot be used: .*{message}"):
        made([RGB, ARRAYS[message]])


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """Three good images among all the bad ones."""
    files = {name: data for name, (data, _) in pictures.bad().items()}
    good = {f"good{i}.png": pictures.encoded(pictures.noise(seed=i)) for i in range(3)}
    return write(tmp_path_factory.mktemp("spoiled"), files | good)


def test_stop(spoiled):
    dataset = read(str(spoiled), columns=("image",))
    total, bad = len(dataset), len(pictures.bad())
    with pytest.raises(DataError, match=f"{bad} of {total} images cannot be used: ") as caught:
        images.examples(dataset, PLAIN, on_bad="stop", labels={})
    text = str(caught.value)
    assert text.count(str(spoiled / "")) == 6  # the folder, and the first five files
    assert f"; and {bad - 5} more; mend or remove them, or set on_bad: skip" in text
    assert "\n" not in text


def test_skip(spoiled):
    dataset = read(str(spoiled), columns=("image",))
    good = [i for i, row in enumerate(dataset.rows) if "good" in row.values["image"].name]
    labels = np.arange(len(dataset), dtype=np.int32)
    got = images.examples(dataset, PLAIN, on_bad="skip", labels={"labels": labels})
    assert got.fixed["labels"].tolist() == got.kept.tolist() == good
    assert len(got) == 3
    note = next(note for note in got.notes if "skipped" in note)
    assert f"skipped {len(dataset) - 3} of {len(dataset)} images: {spoiled / 'bomb.png'} has more than" in note
    whole = images.examples(from_records([dataset[i] for i in good]), PLAIN, labels={})
    assert whole.kept is None
    assert got.lazy.digest() == whole.lazy.digest()
    batch = next(batches(got, batch=4, shuffle=False))
    assert batch["weight"].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("name", pictures.bad())
def test_each_bad_file(name, spoiled):
    message = pictures.bad()[name][1]
    for on_bad in ("stop", "skip"):
        with pytest.raises(DataError, match=f"1 of 1 images cannot be used: .*{name} .*({message}).*; none is left$"):
            made([spoiled / name], on_bad=on_bad)


def test_on_bad_is_checked():
    with pytest.raises(DataError, match="on_bad: must be stop or skip, got 'ignore'"):
        made([RGB], on_bad="ignore")


def test_warnings_of_pillow_do_not_leak():
    """A file whose EXIF is cut off makes Pillow warn wherever it is opened, in threads too."""
    corrupt = pictures.encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09", quality=99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(corrupt)).getexif().get(1)
    assert caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = made([corrupt, RGB])
        next(batches(examples, batch=2, shuffle=False))
    assert not caught


def test_sizes_must_agree_where_none_is_set():
    as_they_are = ImageProcessor()
    assert made([RGB, RGB], as_they_are).lazy.processor.size == (12, 9)
    with pytest.raises(DataError, match=r"images differ in size.* record 0 is 12 x 9 and records, record 1 is 7 x 5"):
        made([RGB, pictures.noise(7, 5)], as_they_are)


# Batches


def folder_of(tmp_path, count=7):
    files = {f"{i % 2}/{i}.png": pictures.encoded(pictures.noise(seed=i)) for i in range(count)}
    return read(str(write(tmp_path, files)), columns=("image", "label"))


@pytest.fixture
def varied(tmp_path):
    dataset = folder_of(tmp_path)
    labels = {"labels": dataset.class_ids("label", ("0", "1"))}
    return images.examples(dataset, PLAIN, augment=VARIED, labels=labels)


def loader(examples, **options):
    return batches(examples, **{"batch": 4, "shuffle": True, "seed": 3, "epochs": 3} | options)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_batches(varied):
    batch = next(loader(varied))
    assert batch["pixel_values"].shape == (4, 8, 6, 3)
    assert batch["pixel_values"].dtype == np.float32
    last = list(loader(varied, shuffle=False, epochs=1))[-1]
    assert last["weight"].tolist() == [1, 1, 1, 0]
    assert np.array_equal(last["pixel_values"][3], last["pixel_values"][0])  # or BatchNorm would see a black square
    assert last["pixel_values"][:3].any()


def test_a_row_depends_on_seed_epoch_and_example_alone(varied):
    rows = {}
    for options in ({}, {"batch": 2}, {"batch": 1, "shuffle": False}):
        data = loader(varied, **options)
        for _ in range(2 * data.steps_per_epoch):
            epoch = data.epoch
            batch = next(data)
            for i, row in zip(batch["index"], batch["pixel_values"], strict=True):
                if i >= 0:
                    assert np.array_equal(rows.setdefault((epoch, int(i)), row), row)
    assert len(rows) == 14
    assert all(not np.array_equal(rows[0, i], rows[1, i]) for i in range(7))
    other = next(loader(varied, seed=4, batch=7, shuffle=False))["pixel_values"]
    assert all(not np.array_equal(rows[0, i], other[i]) for i in range(7))


def test_the_same_image_varies_from_row_to_row():
    rows = next(loader(made([RGB] * 4, augment=VARIED)))["pixel_values"]
    assert len({row.tobytes() for row in rows}) == 4


def test_resume_at_every_position(varied):
    data = loader(varied)
    states, wanted = [], []
    for _ in range(6):
        states.append(json.loads(json.dumps(data.state())))
        wanted.append(next(data))
    used = loader(varied)
    next(used)
    for position, state in enumerate(states):
        used.restore(state)
        assert used.position == position
        assert all(same(next(used), want) for want in wanted[position : position + 2])


def test_processes_share_the_batch(varied):
    whole = list(loader(varied))
    shards = [list(loader(varied, process_index=i, process_count=2)) for i in range(2)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert same({k: np.concatenate([part[k] for part in parts]) for k in batch}, batch)


def test_a_process_with_padding_alone(varied):
    batches_of_last = list(loader(varied, batch=6, process_index=1, process_count=2, shuffle=False, epochs=1))
    assert batches_of_last[-1]["weight"].tolist() == [0, 0, 0]
    assert batches_of_last[-1]["pixel_values"].shape == (3, 8, 6, 3)


def test_evaluation_does_not_vary(tmp_path):
    dataset = folder_of(tmp_path)
    plain = images.examples(dataset, PLAIN, labels={})
    first, *_ = rows = [next(loader(plain, seed=seed, shuffle=False, batch=7)) for seed in (0, 1)]
    assert same(*rows)
    for i, row in enumerate(first["pixel_values"]):
        assert np.array_equal(row, PLAIN(Image.open(dataset[i]["image"])))


def test_digest_names_bytes_processor_and_augmentation(tmp_path, monkeypatch):
    dataset = folder_of(tmp_path)
    digest = images.examples(dataset, PLAIN, labels={}).digest()
    assert images.examples(dataset, PLAIN, labels={}).digest() == digest
    others = {
        images.examples(dataset, dataclasses.replace(PLAIN, mean=(0.4, 0.5, 0.5)), labels={}).digest(),
        images.examples(dataset, PLAIN, augment=Augment(), labels={}).digest(),
        images.examples(dataset, PLAIN, augment=Augment(flip=True), labels={}).digest(),
        images.examples(from_records([dataset[0]]), PLAIN, labels={}).digest(),
    }
    path = dataset[3]["image"]
    path.write_bytes(pictures.encoded(pictures.noise(seed=99)))
    changed = images.examples(dataset, PLAIN, labels={})
    assert len(others | {digest, changed.digest()}) == 6
    monkeypatch.setattr(images, "decode", None)
    changed.digest()


def test_threads_decode_ahead(varied, monkeypatch):
    """While the caller is busy the next batches are made, a bounded number of them."""
    names, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *args: names.append(threading.current_thread().name) or decode(*args))
    monkeypatch.setattr("jaxtransfer.data.loader.THREADS", 2)
    data = loader(varied, epochs=None, batch=1)
    next(data)
    deadline = threading.Event()
    while len(names) < 3 and not deadline.wait(0.01):
        pass
    deadline.wait(0.1)
    assert len(names) == 3
    assert "MainThread" not in names


def test_a_file_that_vanishes_is_named_and_nothing_is_skipped(varied):
    data = loader(varied, shuffle=False, batch=1)
    first = next(data)
    path = varied.lazy.values[1]
    content = path.read_bytes()
    fresh = loader(varied, shuffle=False, batch=1)
    next(fresh)
    fresh.restore(data.state())
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} cannot be read: No such file.*; it was whole when it was checked"):
        next(fresh)
    assert fresh.position == 1
    path.write_bytes(content)
    assert next(fresh)["index"].tolist() == [1]
    assert first["index"].tolist() == [0]
