"""The Python sources on this machine, as texts."""

import bisect
import json
import sys
from pathlib import Path

import pytest

from jaxtransfer.data import DataError, DataSpec, read
from jaxtransfer.data.corpora import python_sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    files = {
        "__init__.py": b"raise SystemExit('it ran')\n",
        "b.py": "é = 1\n".encode(),
        "a/__init__.py": b"\n",
        "a/c.py": b"\xef\xbb\xbfc = 1\n",
        "a/latin.py": "é = 1\n".encode("latin-1"),
        "a/data.txt": b"no code",
        "tests/test_a.py": b"t = 1\n",
        "a/test_c.py": b"t = 1\n",
        "conftest.py": b"t = 1\n",
    }
    for name, content in files.items():
        path = tmp_path / "corpus_of_a_test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "python:corpus_of_a_test"


def test_a_package(package):
    found = read(package, ("text",))
    places = [row.where.removeprefix(f"{package}/") for row in found.rows]
    assert places == ["__init__.py, file 0", "a/c.py, file 1", "b.py, file 2"]
    assert found.strings("text")[1:] == ["c = 1\n", "é = 1\n"]
    assert found.notes == (
        f"{package}: left out 1 empty files",
        f"{package}: left out 1 files that are not utf-8: a/latin.py",
    )
    assert "corpus_of_a_test" not in sys.modules
    one = read(DataSpec(package, split=(1, 2), seed=3), ("text",))
    assert (len(one), one.digest) == (1, found.digest)


def test_a_module_of_one_file():
    (row,), notes = python_sources("python:bisect")
    assert row.values["text"] == Path(bisect.__file__).read_text()
    assert notes == []


def test_the_standard_library():
    found = read("python:stdlib", ("text",))
    places = {row.place.removeprefix("python:stdlib/").removesuffix(", file") for row in found.rows}
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= places
    assert not {place for place in places if "site-packages" in place or place.startswith(("test/", "_sysconfigdata"))}
    assert json.__file__ is not None
    assert Path(json.__file__).read_text() in found.strings("text")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("python:no_such_package_here", "the package no_such_package_here is not installed"),
        ("python:json/decoder", "expected python:PACKAGE"),
        ("python:", "expected python:PACKAGE"),
        ("python:sys", "has no Python sources on the disk"),
    ],
)
def test_no_sources(path, message):
    with pytest.raises(DataError, match=message):
        read(path, ("text",))
