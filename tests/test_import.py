"""`import jaxtransfer` is cheap: heavy packages are imported by the functions that use them."""

import json
import os
import subprocess
import sys
from functools import cache
from inspect import ismodule

import pytest

LAZY = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "tensorflow_datasets",
    "tensorflow",
    "orbax",
    "grain",
    "tyro",
    "torch",
    "pyarrow",
    "datasets",
    "sklearn",
    "pandas",
    "matplotlib",
    "tensorboardX",
)
BUDGET_SECONDS = 0.3
RUNS = 3

# Processor time, not wall time: the machine may be busy with something else.
PROBE = """
import json, sys, time
import jax, flax.nnx, optax
before = set(sys.modules)
start = time.process_time()
import jaxtransfer
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "added": sorted(set(sys.modules) - before)}))
"""


@cache
def probe() -> list[dict]:
    """What importing the package added and cost, in fresh interpreters (the first writes the bytecode)."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        json.loads(
            subprocess.run(
                [sys.executable, "-W", "error", "-c", PROBE],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()[-1]
        )
        for _ in range(RUNS)
    ]


@pytest.mark.parametrize("package", LAZY)
def test_import_leaves_out(package):
    added = {name.split(".")[0] for name in probe()[0]["added"]}
    assert package not in added, f"`import jaxtransfer` imports {package}; import it where it is used"


def test_import_opens_no_device():
    code = "import jaxtransfer; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "False", "import must not touch a device: jax.distributed comes first"


def test_import_prints_nothing():
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import jaxtransfer"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (found.stdout, found.stderr) == ("", "")


def test_import_time():
    seconds = [run["seconds"] for run in probe()]
    assert min(seconds) <= BUDGET_SECONDS, (
        f"`import jaxtransfer` costs {min(seconds):.2f} s beyond jax, flax.nnx and optax; "
        f"the budget is {BUDGET_SECONDS} s (see `python -X importtime -c 'import jaxtransfer'`)"
    )


def test_everything_public_is_there():
    import jaxtransfer

    stated = getattr(jaxtransfer, "__all__", None)
    names = stated or [name for name, value in vars(jaxtransfer).items() if name[0] != "_" and not ismodule(value)]
    assert len(names) == len(set(names)) > 0
    missing = [name for name in names if not hasattr(jaxtransfer, name)]
    assert not missing, f"in __all__ but absent: {missing}"
    found = {name: getattr(jaxtransfer, name) for name in names}
    undocumented = [name for name, value in found.items() if callable(value) and not value.__doc__]
    assert not undocumented, f"public without a docstring: {undocumented}"
