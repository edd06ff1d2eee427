"""Small states, laid out by hand: embed (frozen, bfloat16), three blocks (a frozen norm each), a head, statistics."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer import tree
from jaxtransfer.types import Lineage, State

WHOLE = ((0, 3),)
CUT = ((0, 2), (2, 3))
RULES = [(r".*/kernel", PartitionSpec("fsdp", "tensor")), (r"embed/.*", PartitionSpec("fsdp"))]


def canonical(seed: int = 0):
    draw = np.random.default_rng(seed)

    def array(*shape: int, dtype=jnp.float32):
        return jnp.asarray(draw.normal(size=shape).astype(np.float32)).astype(dtype)

    layer = {"kernel": (8, 4), "bias": (4,), "norm": (4,)}
    return {
        "embed": {"embedding": array(8, 4, dtype=jnp.bfloat16)},
        "blocks": {str(i): {name: array(*shape) for name, shape in layer.items()} for i in range(3)},
        "head": {"kernel": array(8, 2), "ids": jnp.arange(3, dtype=jnp.int32)},
        "stem": {"mean": array(4)},
    }


def is_trained(path: str) -> bool:
    return path.endswith(("kernel", "bias"))


def lineage_of(params) -> Lineage:
    return Lineage("memory", tree.digest(params), fingerprints=tree.fingerprint(params), operations=("made by hand",))


def optimizer() -> optax.GradientTransformation:
    def label(params):
        return tree.map_with_path(lambda path, _: "head" if path.startswith("head") else "rest", params)

    return optax.multi_transform({"rest": optax.adamw(1e-3), "head": optax.sgd(0.1, momentum=0.9)}, label)


def make(runs=WHOLE, *, seed: int = 0, step: int = 3):
    """A state, its frozen complement and the lineage of both; ``runs`` None leaves the blocks unstacked."""
    params = canonical(seed)
    stats, rest = tree.partition(params, lambda path: path == "stem/mean")
    trained, frozen = tree.partition(rest, is_trained)
    lay = (lambda t: tree.stack(t, {"blocks": runs})) if runs else (lambda t: t)
    trained, frozen, stats = lay(trained), lay(frozen), lay(stats)
    with jax.numpy_dtype_promotion("standard"):  # one update: moments that tell layers apart
        _, opt_state = optimizer().update(trained, optimizer().init(trained), trained)
    state = State(jnp.int32(step), trained, stats, opt_state, jax.random.key(step), {"centre": jnp.zeros((0, 4))})
    return state, frozen, lineage_of(params)


def mesh_of(devices) -> Mesh:
    return Mesh(np.asarray(devices).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def placed(values, mesh: Mesh):
    """Matrices split over the mesh where they divide, everything else on all devices."""

    def put(x):
        split = x.ndim >= 2 and x.shape[-2] % 4 == 0 and x.shape[-1] % 2 == 0
        spec = PartitionSpec(*(None,) * (x.ndim - 2), "fsdp", "tensor") if split else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, values)


def abstract(values):
    """Shapes and dtypes only."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


def bits(x) -> np.ndarray:
    data = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.atleast_1d(np.asarray(data)).view(np.uint8)


def assert_same(found, expected) -> None:
    """Bit for bit, the same structure, dtypes and shapes; no abstract leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, (jax.Array, np.ndarray)), path
        assert a.dtype == b.dtype and a.shape == b.shape, path
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=str(path))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
