"""The house has floors: a module imports only from lower ones, and few modules touch the disk.

Everything is read from the syntax tree, so an import inside a function or under `TYPE_CHECKING` counts, and
so does `importlib.import_module` of a constant. What the check cannot see: names computed at run time.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "jaxtransfer"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# A room is a module or a package directly under jaxtransfer/. Rooms on one floor do not import each other;
# inside a room imports are free.
FLOORS = {
    "tree": 0,
    "types": 1,
    "models": 2,
    "adapt": 3,
    "objectives": 3,
    "scores": 3,
    "probes": 3,
    "diagnose": 3,
    "parallel": 3,
    "data": 3,
    "optim": 3,
    "source": 4,
    "features": 4,
    "generation": 4,
    "step": 4,
    "tasks": 4,
    "checkpoint": 5,
    "sweeps": 5,
    "fewshot": 5,
    "phases": 5,
    "run": 6,
    "plan": 6,
    "study": 6,
    "report": 6,
    "config": 7,
    "job": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 11,
}

FLAX_ROOMS = {"models"}
DISK_ROOMS = {"source", "features", "checkpoint", "report", "data", "config", "job", "cli"}

# Modules that exist to reach files or the network (`json` does not; `pathlib` is known by its methods).
DISK_MODULES = set(
    """
    array_record datasets fcntl ftplib glob grain gzip http huggingface_hub importlib.resources
    importlib_resources io linecache mmap orbax os pickle pyarrow requests safetensors shelve shutil
    socket sqlite3 subprocess tarfile tempfile tensorflow_datasets tensorstore urllib zipfile
    """.split()
)
# What `from ... import ...` may take anywhere: neither the environment nor memory is the disk.
HARMLESS = {
    "os": {"PathLike", "cpu_count", "environ", "fspath", "getenv", "getpid"},
    "io": {"BytesIO", "StringIO"},
}
# Methods that only a path, a file or a loader of files has.
DISK_METHODS = set(
    """
    exists from_pretrained fromfile genfromtxt hardlink_to is_dir is_file iterdir loadtxt mkdir open
    push_to_hub read_bytes read_text rglob rmdir save_pretrained savetxt savez savez_compressed
    symlink_to tofile touch unlink write_bytes write_text
    """.split()
)
# Functions whose bare name is too common (`model.save`): only under these names.
DISK_FUNCTIONS = {(module, name) for module in ("np", "numpy", "jnp") for name in ("save", "load", "memmap")}


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute dotted name, at a line of a file."""

    file: Path
    line: int
    module: str
    name: str | None = None  # of `from module import name`

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file below the package folder `root`, relative ones resolved."""
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    package = parts[:-1]  # of a module the folder; of __init__.py the folder it stands in
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(file, node.lineno, module, alias.name)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                name = argument.value
                if name.startswith("."):  # importlib.import_module(".x", __package__)
                    level = len(name) - len(name.lstrip("."))
                    name = ".".join([*package[: len(package) - level + 1], name.lstrip(".")])
                yield Import(file, node.lineno, name)


def _called(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else None


def rooms(root: Path) -> set[str]:
    """Names of the rooms that exist."""
    found = {path.stem for path in root.glob("*.py")}
    return found | {path.name for path in root.iterdir() if path.is_dir() and any(path.rglob("*.py"))}


def room_of(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").parts[0]


def target_room(found: Import, existing: set[str], package: str) -> str | None:
    """The room that an import enters; `__init__` for a name of the package, None for other packages."""
    parts = found.module.split(".")
    if parts[0] != package:
        return None
    if len(parts) > 1:
        return parts[1]
    return found.name if found.name in existing else "__init__"


def sources(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py"))


def check_rooms(root: Path) -> list[str]:
    """Rooms without a floor."""
    return [
        f"{root.name}/{room}: has no floor; give it one in FLOORS, tests/test_floors.py"
        for room in sorted(rooms(root) - FLOORS.keys())
    ]


def check_floors(root: Path) -> list[str]:
    """Imports that climb, or cross to another room on the same floor."""
    problems, existing = [], rooms(root)
    for file in sources(root):
        room = room_of(file, root)
        for found in imports_of(file, root):
            target = target_room(found, existing, root.name)
            if target is None or target == room or room not in FLOORS:
                continue
            where = f"{root.name}/{file.relative_to(root)}:{found.line}"
            if target not in FLOORS:
                problems.append(f"{where}: imports {target}, which has no floor")
            elif FLOORS[target] >= FLOORS[room]:
                how = "another room of its own floor" if FLOORS[target] == FLOORS[room] else "a higher floor"
                problems.append(
                    f"{where}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]}), {how}"
                )
    return problems


def check_flax(root: Path) -> list[str]:
    """Imports of flax outside models/."""
    return [
        f"{root.name}/{file.relative_to(root)}:{found.line}: imports {found.module}, as only models/ may"
        for file in sources(root)
        if room_of(file, root) not in FLAX_ROOMS
        for found in imports_of(file, root)
        if found.top in {"flax", "flaxlib"}
    ]


def check_disk(root: Path) -> list[str]:
    """Uses of disk or network outside the modules that are there for it."""
    problems = []
    for file in sources(root):
        if room_of(file, root) in DISK_ROOMS:
            continue
        where = f"{root.name}/{file.relative_to(root)}"
        for found in imports_of(file, root):
            if found.name in HARMLESS.get(found.module, ()):
                continue
            full = f"{found.module}.{found.name}" if found.name else found.module
            if any(full == module or full.startswith(module + ".") for module in DISK_MODULES):
                problems.append(f"{where}:{found.line}: imports {full}")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (used := _disk_call(node)):
                problems.append(f"{where}:{node.lineno}: calls {used}")
    starred = ", ".join(sorted(DISK_ROOMS))
    return [f"{problem}; only {starred} touch disk or network" for problem in problems]


def _disk_call(node: ast.Call) -> str | None:
    function = node.func
    if isinstance(function, ast.Name):
        return "open()" if function.id == "open" else None
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else None
        if function.attr in DISK_METHODS or (owner, function.attr) in DISK_FUNCTIONS:
            return f".{function.attr}()"
    return None


CHECKS = {"rooms": check_rooms, "floors": check_floors, "flax": check_flax, "disk": check_disk}


@pytest.mark.parametrize("check", CHECKS)
def test_package(check):
    assert sources(ROOT), f"no sources under {ROOT}"
    problems = CHECKS[check](ROOT)
    assert not problems, "\n" + "\n".join(problems)


# The checker itself: each violation is one file and its text, with the message that it must give.
VIOLATIONS = {
    "floors": {
        "upward": (
            "tree/rules.py",
            "import jaxtransfer.models.api",
            "tree (floor 0) imports models (floor 2)",
        ),
        "from a module": ("tree/rules.py", "from jaxtransfer.step import make_step", "step (floor 4)"),
        "from the package": ("optim.py", "from jaxtransfer import source", "source (floor 4)"),
        "relative": ("models/api.py", "from ..adapt import heads", "adapt (floor 3)"),
        "relative, a room": ("models/api.py", "from .. import cli", "cli (floor 9)"),
        "relative, in __init__": ("models/__init__.py", "from ..step import make_step", "step (floor 4)"),
        "own floor": ("objectives/task.py", "import jaxtransfer.adapt", "another room of its own floor"),
        "report and run": ("report.py", "from .run import fit", "report (floor 6) imports run (floor 6)"),
        "lazy": ("tree/rules.py", "def f():\n    from .. import cli", "tree/rules.py:2: tree (floor 0)"),
        "conditional": ("types.py", "if 0:\n    from jaxtransfer.source import load", "source (floor 4)"),
        "by name": ("optim.py", "import importlib as i\ni.import_module('jaxtransfer.run')", "run (floor 6)"),
        "by relative name": ("optim.py", "import_module('.run', __package__)", "run (floor 6)"),
        "re-export": ("step.py", "from jaxtransfer import load", "__init__ (floor 10)"),
        "whole package": ("cli.py", "import jaxtransfer", "__init__ (floor 10)"),
        "main": ("__init__.py", "from .__main__ import main", "__main__ (floor 11)"),
        "misspelt": ("cli.py", "from jaxtransfer.sources import load", "imports sources, which has no floor"),
    },
    "rooms": {
        "package": ("cellar/wine.py", "", "jaxtransfer/cellar: has no floor"),
        "module": ("utils.py", "", "jaxtransfer/utils: has no floor"),
    },
    "flax": {
        "module": ("adapt/heads.py", "from flax import nnx", "adapt/heads.py:1: imports flax"),
        "lazy": ("step.py", "def f():\n    import flax.nnx as nnx", "step.py:2: imports flax.nnx"),
    },
    "disk": {
        "open": ("step.py", "open('x')", "step.py:1: calls open()"),
        "path": (
            "tree/diff.py",
            "from pathlib import Path\nPath('x').write_text('')",
            "diff.py:2: calls .write",
        ),
        "os": ("plan.py", "import os", "plan.py:1: imports os"),
        "os.path": ("plan.py", "from os.path import join", "imports os.path.join"),
        "names of os": ("plan.py", "from os import environ, remove", "imports os.remove"),
        "resources": ("study.py", "from importlib import resources", "imports importlib.resources"),
        "safetensors": ("models/names.py", "from safetensors.numpy import save", "imports safetensors.numpy"),
        "hub": (
            "tasks/text.py",
            "def f():\n    import huggingface_hub",
            "text.py:2: imports huggingface_hub",
        ),
        "numpy": ("scores/logme.py", "import numpy as np\nnp.load('x')", "scores/logme.py:2: calls .load()"),
        "tokenizer": ("tasks/text.py", "T.from_pretrained('x')", "calls .from_pretrained()"),
    },
}

ALLOWED = {
    "downward": ("models/api.py", "from jaxtransfer.tree import paths\nfrom ..types import Model"),
    "inside a room": ("adapt/heads.py", "from . import a\nfrom .b import x\nfrom jaxtransfer.adapt import y"),
    "inside a room's __init__": ("models/__init__.py", "from .api import apply\nfrom . import names"),
    "other packages": ("tree/paths.py", "import jax, types\nfrom jaxtransfer_other import x\nimport source"),
    "flax in models": ("models/layers.py", "from flax import nnx"),
    "disk where it belongs": ("data/files.py", "import os, pyarrow\nopen('x')"),
    "environment": ("parallel/start.py", "from os import environ\nfrom io import StringIO"),
    "the top": ("__init__.py", "from jaxtransfer.cli import main"),
    "the main module": ("__main__.py", "from jaxtransfer.cli import main\nimport jaxtransfer"),
    "look-alikes": ("step.py", "state.replace(x=1)\nmodel.load(y)\nname.replace('a', 'b')"),
}


def write(folder: Path, name: str, text: str) -> Path:
    root = folder / PACKAGE
    for file, content in {"__init__.py": "", "source.py": "", "cli.py": "", name: text}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content)
    return root


@pytest.mark.parametrize("check, case", [(check, case) for check, cases in VIOLATIONS.items() for case in cases])
def test_checker_catches(check, case, tmp_path):
    name, text, message = VIOLATIONS[check][case]
    problems = CHECKS[check](write(tmp_path, name, text))
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize("case", ALLOWED)
def test_checker_allows(case, tmp_path):
    root = write(tmp_path, *ALLOWED[case])
    assert [problem for check in CHECKS.values() for problem in check(root)] == []
