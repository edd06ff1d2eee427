"""Every source of records, and every way in which one can be unusable."""

import csv
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtransfer.data import DataError, DataSpec, from_records, read

ROWS = [{"text": "lovely", "label": "good"}, {"text": 'so "so", she said', "label": "bad"}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def records(dataset):
    return [dataset[i] for i in range(len(dataset))]


FILES = {
    "a.jsonl": "".join(json.dumps(row | {"id": 1}) + "\n" for row in ROWS),
    "a.json": json.dumps(ROWS[0]) + "\r\n" + json.dumps(ROWS[1]),
    "a.csv": 'label,text\ngood,lovely\nbad,"so ""so"", she said"\n',
    "a.tsv": 'label\ttext\ngood\tlovely\nbad\tso "so", she said\n\n',
    "bom.csv": '\ufefftext,label\nlovely,good\n"so ""so"", she said",bad',
}


@pytest.mark.parametrize("name", FILES)
def test_files_by_suffix(name, tmp_path):
    path = write(tmp_path, name, FILES[name])
    dataset = read(path)
    assert records(dataset) == ROWS
    assert dataset.digest == hashlib.sha256(FILES[name].encode()).hexdigest()
    assert dataset.columns == ("text", "label")


OPTIONS = {
    "renamed columns": ({"columns": {"text": "tweet"}, "format": "csv"}, "tweet,label\nlovely,good\n"),
    "semicolons": ({"format": "csv", "delimiter": ";"}, "text;label\nlovely;good\n"),
    "bars, unquoted": ({"format": "tsv", "delimiter": "|"}, 'text|label\n"oh|good\n'),
    "plain lines": ({"pattern": r"(?P<label>\S+) (?P<text>.*)"}, "good very lovely\n"),
    "latin-1": ({"pattern": r"(?P<label>\S+) (?P<text>.*)", "encoding": "latin-1"}, b"good caf\xe9 \x85 x\n"),
}
FOUND = {
    "renamed columns": ("lovely", "good"),
    "semicolons": ("lovely", "good"),
    "bars, unquoted": ('"oh', "good"),
    "plain lines": ("very lovely", "good"),
    "latin-1": ("caf\xe9 \x85 x", "good"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, tmp_path):
    options, content = OPTIONS[case]
    dataset = read(DataSpec(write(tmp_path, "a.txt", content), **options))
    assert records(dataset) == [dict(zip(("text", "label"), FOUND[case], strict=True))]


def test_only_wanted_columns(tmp_path):
    assert read(write(tmp_path, "a.csv", "id,text\n1,x\n"), columns=("text",))[0] == {"text": "x"}


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [r["text"] for r in ROWS], "label": pa.array([1, 0]), "other": [0.5, 1.5]})
    pq.write_table(table, path)
    dataset = read(str(path))
    assert records(dataset) == [{"text": ROWS[0]["text"], "label": 1}, {"text": ROWS[1]["text"], "label": 0}]
    assert dataset.classes("label") == ("0", "1")
    assert dataset.rows[1].where == f"{path}, row 1"


def test_glob_reads_all_files_in_order(tmp_path):
    write(tmp_path, "part-1.csv", "text,label\nb,y\n")
    write(tmp_path, "part-0.csv", "text,label\na,x\n")
    dataset = read(str(tmp_path / "part-*.csv"))
    assert dataset.strings("text") == ["a", "b"]
    assert dataset.digest != read(str(tmp_path / "part-0.csv")).digest


def test_packaged_reviews():
    dataset = read("packaged:reviews/train")
    assert len(dataset) > 0
    assert len(dataset.classes("label")) == 2


PNG = b"\x89PNG\r\n\x1a\n not really: it is never decoded"


@pytest.fixture
def prepared(tmp_path):
    """A tiny TFDS data set, prepared as ArrayRecord."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label, scan = tfds.features.ClassLabel(names=["bad", "good"]), tfds.features.Image(shape=(None, None, 3))
            features = {"text": tfds.features.Text(), "label": label, "scan": scan}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, {"text": f"r\xe9view {i}", "label": i % 2, "scan": io.BytesIO(PNG)}

    builder = TinyReviews(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return str(builder.data_path)


@pytest.mark.filterwarnings("default")  # preparing is foreign code
def test_tfds_folder(prepared):
    dataset = read(f"tfds:{prepared}:train")
    assert "tensorflow" not in sys.modules
    assert sorted(dataset.strings("text")) == [f"r\xe9view {i}" for i in range(6)]
    assert all(row["label"] == ("bad", "good")[int(row["text"][-1]) % 2] for row in records(dataset))
    assert len(read(f"tfds:{prepared}:train[:50%]")) == 3
    import tensorflow_datasets

    tensorflow_datasets.core.add_data_dir(str(Path(prepared).parents[1]))
    for name in ("tiny_reviews", "tiny_reviews:1.0.0"):
        assert read(f"tfds:{name}:train").digest == dataset.digest
    for path, message in {
        f"tfds:{prepared}:test": "Unknown split",
        f"tfds:{prepared}": "expected tfds:NAME:SPLIT",
        "tfds:no_such_reviews/plain:1.0.0:train[:10%]": "no_such_reviews",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no column 'stars'; it has"):
        read(DataSpec(f"tfds:{prepared}:train", columns={"label": "stars"}))


def test_hugging_face(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    made = datasets.Dataset.from_dict({"sentence": ["ok", "no"], "label": [1, 0]}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or made)
    dataset = read(DataSpec("hf:owner/glue/sst2:train[:10%]", columns={"text": "sentence"}))
    assert asked == [(("owner/glue", "sst2"), {"split": "train[:10%]"})]
    assert records(dataset) == [{"text": "ok", "label": "good"}, {"text": "no", "label": "bad"}]
    with pytest.raises(DataError, match="no column 'text'; it has sentence, label"):
        read("hf:owner/glue:train")


def test_hugging_face_absent_set(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"hf:a/b:train: cannot be loaded: no network$"):
        read("hf:a/b:train")


# Selections


def numbered(folder, name, texts):
    return write(folder, name, "text,label\n" + "".join(f"{text},x\n" for text in texts))


def test_split_is_the_permutation(tmp_path):
    path = numbered(tmp_path, "a.csv", range(10))
    order = [str(i) for i in np.random.RandomState(0).permutation(10)]
    assert read(DataSpec(path, split=(0, 6))).strings("text") == order[:6]
    assert read(DataSpec(path, split=(6, 10))).strings("text") == order[6:]
    assert read(DataSpec(path, split=(0, 10), seed=1)).strings("text") != order
    with pytest.raises(DataError, match=r"split \[0, 11\] reaches beyond its 10 rows"):
        read(DataSpec(path, split=(0, 11)))


def test_unique_and_without(tmp_path):
    train = numbered(tmp_path, "train.csv", ["a", "b", "a", " a  ", "c"])
    test = numbered(tmp_path, "test.csv", ["c", "d"])
    unique = read(DataSpec(train, unique=True))
    assert unique.strings("text") == ["a", "b", "c"]
    assert unique.notes == (f"{train}: dropped 2 of 5 rows, duplicates of earlier ones",)
    clean = read(DataSpec(train, without=test))
    assert clean.strings("text") == ["a", "b", "a", " a  "]
    assert clean.notes == (f"{train}: dropped 1 of 5 rows, they occur in {test}",)
    assert clean.digest != read(train).digest
    with pytest.raises(DataError, match="no rows are left without"):
        read(DataSpec(train, without=train))


# Bad input: name, content, options, message

BAD = {
    "missing column": ("a.csv", "text,stars\nx,5\n", {}, "a.csv, line 2: no column 'label'; it has text, stars"),
    "missing key": (
        "a.jsonl",
        '{"text": "x", "label": 1}\n{"text": "y"}',
        {},
        "line 2: no column 'label'; it has text",
    ),
    "broken UTF-8": ("a.csv", b"text,label\nok,x\n\xff,x\n", {}, "line 3: byte 0xff at offset 16 is not utf-8; set"),
    "no rows": ("a.csv", "text,label\n", {}, "a.csv: has no rows"),
    "empty file": ("a.jsonl", "", {}, "a.jsonl: has no rows"),
    "empty line": ("a.jsonl", '{"text": "x", "label": 1}\n\n{}', {}, "line 2: is empty"),
    "no JSON": ("a.jsonl", "{'text'}", {}, "line 1: is not JSON"),
    "nested too deep": ("a.jsonl", "[" * 200_000, {}, "line 1: is not JSON"),
    "key twice": ("a.jsonl", '{"text": "x", "text": "y"}', {}, "a.jsonl, line 1: key 'text' stands there twice"),
    "key twice, inside": ("a.jsonl", '{"text": [{"a": 1, "b": 2, "a": 1}]}', {}, "line 1: key 'a' stands there twice"),
    "JSON array": ("a.json", '[{"text": "x"}]', {}, "line 1: expected one JSON object a line"),
    "ragged csv": ("a.csv", "text,label\nx,y,z\n", {}, r"line 2: 3 fields, the header has 2 \(text, label\)"),
    "ragged csv, later": ("a.csv", 'text,label\n"x\ny",l\nz\n', {}, "line 4: 1 fields"),
    "open quote": ("a.csv", 'text,label\n"x,y\n', {}, "line 2: unexpected end of data"),
    "ragged tsv": ("a.tsv", "text\tlabel\nx y\n", {}, "line 2: 1 fields, the header has 2"),
    "double header": ("a.tsv", "text\ttext\nx\ty\n", {}, "its header names text twice"),
    "no match": (
        "a.txt",
        "good\n",
        {"pattern": r"(?P<label>\S+) (?P<text>.*)"},
        "line 1: pattern .* does not match 'good'",
    ),
    "no Parquet": ("a.parquet", "PAR1 of a kind", {}, "a.parquet: is not readable as Parquet"),
    "no format": ("a.txt", "x", {}, "its suffix is none of .jsonl"),
    "stray delimiter": (
        "a.jsonl",
        "{}",
        {"delimiter": ";"},
        "delimiter is for csv, tsv and conll, this file is read as jsonl",
    ),
    "unknown column": ("a.csv", "text,label\nx,y\n", {"columns": {"txt": "x"}}, "'txt' is no column of this task"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, tmp_path):
    name, content, options, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        read(DataSpec(write(tmp_path, name, content), **options))
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'label'; it has text"):
        read(str(tmp_path / "a.parquet"))


PATHS = {
    "absent.csv": "absent.csv: no such file",
    "absent-*.csv": r"absent-\*.csv: matches no file",
    "packaged:reviews/nothing": "is not in the package; it holds",
    ".": r"\.: no column 'text'; it has image, label",
}


@pytest.mark.parametrize("path", PATHS)
def test_missing_files(path):
    with pytest.raises(DataError, match=PATHS[path]):
        read(path)


SPECS = {
    "path: must name": {"path": ""},
    "encoding: 'utf-9' is unknown": {"encoding": "utf-9"},
    "encoding: 'rot13' is unknown": {"encoding": "rot13"},
    "encoding: 'hex' is unknown": {"encoding": "hex"},
    "delimiter: must be one character": {"delimiter": ", "},
    "is not a regular expression": {"pattern": "(?P<text>"},
    "has no named group": {"pattern": ".*"},
    "give it without format": {"pattern": "(?P<text>.*)", "format": "csv"},
    "split: must be": {"split": (3, 3)},
    "seed: must be in": {"seed": -1},
}


@pytest.mark.parametrize("message", SPECS)
def test_bad_specs(message):
    with pytest.raises(DataError, match=message):
        DataSpec(**{"path": "x", **SPECS[message]})


# Columns


def test_classes_and_ids():
    dataset = from_records([{"label": value} for value in ("10", 2, np.int64(9), "2")])
    assert dataset.classes("label") == ("2", "9", "10")
    assert dataset.class_ids("label", ("2", "9", "10")).tolist() == [2, 0, 1, 0]
    assert from_records([{"label": True}, {"label": False}]).classes("label") == ("false", "true")


def test_numbers_count_into_names():
    dataset = from_records([{"label": 1}, {"label": "bad"}, {"label": "0"}])
    ids = dataset.class_ids("label", ("bad", "good"))
    assert ids.tolist() == [1, 0, 0]
    assert ids.dtype == np.int32


def test_numbers_do_not_count_into_other_numbers():
    zero = from_records([{"label": 3}, {"label": 0}])
    for read_as in (zero.class_ids, zero.multi_hot):
        with pytest.raises(DataError, match=r"record 1: label '0' is unknown; known: 1, 2, 3, 4, 5$"):
            read_as("label", ("1", "2", "3", "4", "5"))
    assert zero.class_ids("label", ("0", "one", "two", "three")).tolist() == [3, 0]


VALUES = {
    "records, record 1: text is empty": ("strings", {"text": " \t"}),
    "record 1: text is None, expected a text": ("strings", {"text": None}),
    "record 1: text is 3, expected a text": ("strings", {"text": 3}),
    "record 1: text 'ugly' is unknown; known: bad, good": ("ids", {"text": "ugly"}),
    "record 1: text '2' is unknown": ("ids", {"text": 2}),
    "record 1: text '-1' is unknown": ("ids", {"text": -1}),
    "record 1: text is 1.0, expected a name or a whole number": ("ids", {"text": 1.0}),
    "record 1: text is '', expected a name": ("ids", {"text": ""}),
    r"record 1: text holds '.ud800' at character 5, half of a surrogate pair": ("strings", {"text": "good \ud800"}),
    "record 1: no column 'text'; it has txt": ("none", {"txt": ""}),
}


@pytest.mark.parametrize("message", VALUES)
def test_bad_values(message):
    kind, record = VALUES[message]
    with pytest.raises(DataError, match=message):
        dataset = from_records([{"text": "good"}, record])
        dataset.strings("text") if kind == "strings" else dataset.class_ids("text", ("bad", "good"))


def test_lines_in_errors_count_quoted_line_ends(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",x\n" ",x\n')
    with pytest.raises(DataError, match=r"a\.csv, line 4: text is empty"):
        read(path).strings("text")


def test_a_field_of_csv_may_be_long(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f"text,label\n{'x' * 200_000},a\n")
    assert len(read(path)[0]["text"]) == 200_000
    with pytest.raises(DataError, match="unexpected end of data"):
        read(write(tmp_path, "b.csv", 'text,label\n"x,y\n'))
    assert csv.field_size_limit() == before


def test_no_records():
    with pytest.raises(DataError, match="no records"):
        from_records([])


# Real sets, read by options alone: file, options, rows, classes

PLAIN = {"pattern": r"(?P<label>\S+) (?P<text>.*)", "encoding": "latin-1"}
FDU = {"pattern": r"(?P<label>[01])\t(?P<text>.*)", "encoding": "latin-1"}
UCI = {"pattern": r"(?P<text>.*)\t(?P<label>[01])"}
TWEETS = {"columns": {"text": "tweet"}}
REAL = {
    "mr/rt-polarity.all": (PLAIN, 10_662, 2),
    "trec/TREC.train.all": (PLAIN, 5_452, 6),
    "trec/TREC.test.all": (PLAIN, 500, 6),
    "uci/amazon_cells_labelled.txt": (UCI, 1_000, 2),
    "uci/imdb_labelled.txt": (UCI, 1_000, 2),
    "fdu/dvd.task.test": (FDU, 400, 2),
    "fdu/kitchen_housewares.task.train": (FDU, 1_600, 2),
    "fdu/books.task.t[er]*": (FDU, 2_000, 2),
    "afrisenti/pcm/train.tsv": (TWEETS, 5_121, 3),
    "afrisenti/swa/test.tsv": (TWEETS, 748, 3),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_sets(name, data_root):
    options, rows, classes = REAL[name]
    dataset = read(DataSpec(str(data_root / "text" / name), **options))
    assert (len(dataset), len(dataset.classes("label"))) == (rows, classes)
    assert len(dataset.strings("text")) == rows


@pytest.mark.data
@pytest.mark.parametrize(("domain", "twice"), [("books", 8), ("dvd", 14), ("kitchen_housewares", 9)])
def test_fdu_duplicates(domain, twice, data_root):
    folder = data_root / "text" / "fdu"
    spec = DataSpec(str(folder / f"{domain}.task.train"), without=str(folder / f"{domain}.task.test"), **FDU)
    assert len(read(spec)) == 1_600 - twice
