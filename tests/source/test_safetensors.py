import io
import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtransfer.source.safetensors import (
    DTYPES,
    INDEX,
    PICKLE_SUFFIXES,
    WEIGHTS,
    SafetensorsError,
    TensorFile,
    open_weights,
    parse_header,
)
from jaxtransfer.source.writer import write, write_folder

BAD_NAMES = r"/etc/passwd|../../etc/passwd|..|.|./w|a/../b|a/..|~/x|~root|C:\w|c:w|C:/w|\\host\share|a\b|..\w|//x|/|/w"
BAD_NAMES = BAD_NAMES.split("|")
BAD_NAMES += ["", " ", " w", "w ", "\0", "w\0.bin", "a\nb", "a\rb", "a\tb", "\x1b[2Jw", "\x1b]0;title\x07", "\x7f"]
BAD_NAMES += [
    "\x80w",
    "w\u202etxt",
    "w\u200b",
    "\u2028",
    "\ufeffw",
    "\ue000",
    "\ud800",
    "a\u00a0b",
    "w" * 513,
    "w/" * 300,
]


def blob(header, data=b"", *, length=None):
    """A file's bytes from a header (an object or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def opened(tmp_path, content, name=WEIGHTS):
    path = tmp_path / name
    path.write_bytes(content)
    return TensorFile(path)


def test_names_are_forty():
    assert len(set(BAD_NAMES)) >= 40


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_name_is_refused(tmp_path, name):
    with pytest.raises(SafetensorsError, match=r"model\.safetensors: .*name") as caught:
        opened(tmp_path, blob({name: entry()}, bytes(8)))
    assert str(caught.value).isprintable()
    with pytest.raises(SafetensorsError, match="name"):
        write(tmp_path / "out.safetensors", {name: np.zeros(2, np.float32)}, {})
    assert not (tmp_path / "out.safetensors").exists()


GOOD = json.dumps({"w": entry()}).encode()
MALFORMED = {
    "empty file": (b"", "too few"),
    "eight bytes": (bytes(8), "too few"),
    "no header": (blob(b"", bytes(8)), "does not begin"),
    "not an object": (blob(b"[]"), "does not begin"),
    "space first": (blob(b" " + GOOD, bytes(8)), "does not begin"),
    "not JSON": (blob(b"{nope}"), "is not JSON"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "is not JSON"),
    "NaN": (blob(b'{"w": NaN}'), "NaN is no JSON number"),
    "huge integer": (blob(b'{"w": ' + b"9" * 5000 + b"}"), "is not JSON"),
    "deep": (blob(b'{"w":' + b"[" * 200_000), "nested too deeply"),
    "many entries": (blob(b'{"w":[' + b"0," * 1_000_001 + b"0]}"), "more than"),
    "duplicate tensor": (blob(b'{"w":1,"w":2}'), "'w' stands there twice"),
    "duplicate field": (blob(GOOD.replace(b'"shape"', b'"dtype": "I8", "shape"'), bytes(8)), "twice"),
    "header over 100 MB": (blob(GOOD, bytes(8), length=100_000_001), "the format allows 100000000"),
    "header of 2^63": (blob(GOOD, bytes(8), length=2**63), "the format allows"),
    "header over the file": (blob(GOOD, bytes(8), length=len(GOOD) + 9), "truncated"),
    "truncated data": (blob(GOOD, bytes(7)), "truncated: the tensors take 8 bytes, the file has 7"),
    "no data": (blob(GOOD), "truncated"),
    "bytes left over": (blob(GOOD, bytes(9)), "bytes left over"),
    "unknown dtype": (blob({"w": entry(dtype="F4")}, bytes(8)), "dtype 'F4' is not one of"),
    "dtype no string": (blob({"w": entry(dtype=["F32"])}, bytes(8)), "is not one of"),
    "shape no list": (blob({"w": {**entry(), "shape": 2}}, bytes(8)), "shape must be"),
    "negative size": (blob({"w": entry(shape=(-2,))}, bytes(8)), "shape must be"),
    "float size": (blob({"w": entry(shape=(2.0,))}, bytes(8)), "shape must be"),
    "true as a size": (blob({"w": entry(shape=(2, True))}, bytes(8)), "shape must be"),
    "2^62": (blob({"w": entry(shape=(2**62,))}, bytes(8)), "overflows"),
    "2^62 by 0": (blob({"w": entry(shape=(2**62, 0), offsets=(0, 0))}), "overflows"),
    "2^70": (blob({"w": entry(shape=(2**70,))}, bytes(8)), "shape must be"),
    "2^31 by 2^31": (blob({"w": entry(shape=(2**31, 2**31))}, bytes(8)), "overflows"),
    "rank 33": (blob({"w": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)), "at most 32 sizes"),
    "rank 100,000": (blob({"w": entry(shape=(1,) * 100_000, offsets=(0, 4))}, bytes(4)), "at most 32 sizes"),
    "one offset": (blob({"w": entry(offsets=(0,))}, bytes(8)), "data_offsets must be two"),
    "offsets backwards": (blob({"w": entry(offsets=(8, 0))}, bytes(8)), "takes 8 bytes"),
    "offsets too few": (blob({"w": entry(offsets=(0, 4))}, bytes(4)), "takes 8 bytes, its offsets"),
    "no fields": (blob({"w": {}}), "expected dtype, shape and data_offsets"),
    "one field more": (blob({"w": {**entry(), "order": "F"}}, bytes(8)), "expected dtype, shape"),
    "entry no object": (blob({"w": [1]}), "expected dtype, shape"),
    "metadata no object": (blob({"__metadata__": [], "w": entry()}, bytes(8)), "__metadata__"),
    "metadata no strings": (blob({"__metadata__": {"a": 1}, "w": entry()}, bytes(8)), "__metadata__"),
    "overlap": (blob({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "tensor b overlaps"),
    "same bytes twice": (blob({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole": (blob({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor b leaves a hole"),
    "hole at the front": (blob({"a": entry(offsets=(4, 12))}, bytes(12)), "leaves a hole"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_is_refused(tmp_path, case):
    content, message = MALFORMED[case]
    with pytest.raises(SafetensorsError) as caught:
        opened(tmp_path, content)
    text = str(caught.value)
    assert message in text
    assert text.startswith("model.safetensors: ")
    assert "\n" not in text and len(text) < 500


def test_truncation_at_every_byte_is_noticed(tmp_path):
    whole = blob({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16))
    for size in range(len(whole)):
        with pytest.raises(SafetensorsError):
            opened(tmp_path, whole[:size])
    assert set(opened(tmp_path, whole).tensors) == {"a", "b"}


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the control: the file that the canary opens
def test_pickles_are_refused_and_never_run(tmp_path):
    canary = tmp_path / "canary"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    payloads = [pickle.dumps(Canary(canary), protocol) for protocol in range(6)] + [archive.getvalue()]
    for payload in payloads:
        for name in [WEIGHTS, *(f"weights{suffix}" for suffix in PICKLE_SUFFIXES), "weights.PT"]:
            with pytest.raises(SafetensorsError, match="safetensors/convert"):
                opened(tmp_path, payload, name)
    assert not canary.exists()
    pickle.loads(payloads[0])
    assert canary.exists()  # the canary would have sung


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    raw = GOOD + b" " * (0x10280 - len(GOOD))  # little-endian 80 02 01: a pickle's first bytes
    assert opened(tmp_path, blob(raw, bytes(8))).tensors["w"].shape == (2,)


PIECES = [b"[", b"}", b"-1", b"e9", b'"', b"\\u0000", b'"a":']


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_headers_raise_only_our_error(data):
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry((1, 2), "I16", (8, 12))}
    raw = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"[", b"}", b"-1", b"e9", b'"', b"\\u0000"]))
        )
        raw[at : at + data.draw(st.integers(0, 3))] = piece
    try:
        tensors, metadata = parse_header(bytes(raw), 12, "fuzz")
    except SafetensorsError as error:
        assert str(error).startswith("fuzz") and "\n" not in str(error)
    else:
        assert sum(info.stop - info.start for info in tensors.values()) == 12
        assert all(isinstance(value, str) for value in metadata.values())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_raise_only_our_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "arbitrary.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError):
        TensorFile(path)


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(), (0,), (3,), (2, 0, 3), (5, 7), (2, 3, 4)]
    out = {}
    for code, dtype in DTYPES.items():
        for shape in shapes:
            values = rng.integers(0, 2 if code == "BOOL" else 100, shape)
            out[f"{code}.{len(shape)}.{int(np.prod(shape))}"] = np.asarray(values).astype(dtype)
    out["transposed"] = rng.standard_normal((6, 5)).astype(np.float32).T
    return out


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_dtype_survives_a_round_trip(tmp_path):
    wanted = tensors()
    path = write(tmp_path / WEIGHTS, wanted, {"format": "pt"})
    found = TensorFile(path)
    assert set(found.tensors) == set(wanted)
    assert found.metadata == {"format": "pt"}
    assert all(same(found.read(name), array) for name, array in wanted.items())
    assert list(tmp_path.iterdir()) == [path]


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    wanted = {name: array for name, array in tensors().items() if array.dtype.isbuiltin == 1}
    ours = library.load_file(write(tmp_path / "a.safetensors", wanted, {}))
    assert ours.keys() == wanted.keys() and all(same(ours[name], wanted[name]) for name in wanted)
    library.save_file({name: a.copy() for name, a in wanted.items()}, tmp_path / "b.safetensors")
    theirs = TensorFile(tmp_path / "b.safetensors")
    assert theirs.tensors.keys() == wanted.keys()
    assert all(same(theirs.read(name), wanted[name]) for name in wanted)


def test_a_view_cannot_be_written_to(tmp_path):
    found = TensorFile(write(tmp_path / WEIGHTS, {"w": np.zeros(3, np.float32)}, {}))
    with pytest.raises(ValueError, match="read-only"):
        found.read("w")[0] = 1


def test_bool_of_other_bytes_is_refused(tmp_path):
    found = opened(tmp_path, blob({"w": entry((8,), "BOOL")}, bytes([0, 1, 2, 0, 0, 0, 0, 0])))
    with pytest.raises(SafetensorsError, match="bytes other than 0 and 1"):
        found.read("w")


def test_unsupported_dtype_is_not_written(tmp_path):
    with pytest.raises(SafetensorsError, match="complex64 has no place"):
        write(tmp_path / WEIGHTS, {"w": np.zeros(2, np.complex64)}, {})
    with pytest.raises(SafetensorsError, match="float8_e4m3b11fnuz has no place"):
        write(tmp_path / WEIGHTS, {"w": np.zeros(2, ml_dtypes.float8_e4m3b11fnuz)}, {})
    assert not list(tmp_path.iterdir())


def test_what_reads_back_differently_is_an_error(tmp_path, monkeypatch):
    real = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: real(self, name) + np.float32(1))
    with pytest.raises(SafetensorsError, match="reads back other"):
        write(tmp_path / WEIGHTS, {"w": np.zeros(2, np.float32)}, {})


def files_of(folder):
    return {path.name: path for path in folder.iterdir()}


def shards(folder, **changes):
    """Two shards and their index, the index's map changed."""
    write(folder / "a.safetensors", {"x": np.ones(2, np.float32)}, {})
    write(folder / "b.safetensors", {"y": np.ones(3, np.float32)}, {})
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"} | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v is not None}}))
    return files_of(folder)


def test_shards_round_trip(tmp_path):
    wanted = {f"w{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    written = write_folder(tmp_path, wanted, {"format": "pt"}, shard_bytes=900)
    names = [path.name for path in written]
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert json.loads(written[-1].read_text())["metadata"]["total_size"] == 2000
    found = open_weights(files_of(tmp_path))
    assert all(same(found[name].read(name), array) for name, array in wanted.items())


INDEXES = {
    "traversal": ({"x": "../a.safetensors"}, "no plain name"),
    "absolute": ({"x": "/tmp/a.safetensors"}, "no plain name"),
    "folder": ({"x": "sub/a.safetensors"}, "no plain name"),
    "hidden": ({"x": ".a.safetensors"}, "no plain name"),
    "windows": ({"x": "C:\\a.safetensors"}, "no plain name"),
    "newline": ({"x": "a.safetensors\n"}, "no plain name"),
    "suffix": ({"x": "a.bin"}, "no plain name"),
    "number": ({"x": 1}, "no plain name"),
    "absent shard": ({"x": "c.safetensors"}, "c.safetensors are not in the folder"),
    "absent tensor": ({"z": "a.safetensors"}, "'z' is not in a.safetensors"),
    "wrong shard": ({"x": "b.safetensors"}, "'x' is not in b.safetensors"),
    "unlisted tensor": ({"x": None, "y": "b.safetensors", "x2": "a.safetensors"}, "'x2' is not in a.safetensors"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_and_shards_must_agree(tmp_path, case):
    changes, message = INDEXES[case]
    with pytest.raises(SafetensorsError, match=message):
        open_weights(shards(tmp_path, **changes))


def test_a_tensor_that_the_index_does_not_list_is_an_error(tmp_path):
    files = shards(tmp_path)
    write(files["b.safetensors"], {"y": np.ones(3, np.float32), "z": np.ones(1, np.float32)}, {})
    with pytest.raises(SafetensorsError, match=r"does not list tensor z in b\.safetensors"):
        open_weights(files)


@pytest.mark.parametrize(
    "text, message",
    [("{}", "no weight_map"), ('{"weight_map": {}}', "no weight_map"), ("[]", "expected a JSON object")],
)
def test_malformed_index(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SafetensorsError, match=message):
        open_weights(files_of(tmp_path))
