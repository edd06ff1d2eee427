"""Random nested trees for hypothesis."""

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

settings.register_profile("house", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("house")

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/@:"), min_size=1, max_size=4)
"""Keys as users write them, digits of every script included; no separators."""


def arrays() -> st.SearchStrategy[np.ndarray]:
    """Small arrays of several shapes and dtypes."""
    shapes = st.sampled_from([(), (1,), (3,), (2, 3)])
    dtypes = st.sampled_from(["float32", "float16", "int8", "bool"])
    return st.builds(lambda shape, dtype, seed: draw(shape, dtype, seed), shapes, dtypes, st.integers(0, 99))


def draw(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """An array of random values."""
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


def trees(leaves: st.SearchStrategy | None = None) -> st.SearchStrategy[dict]:
    """Nested dictionaries, three deep, without empty nodes."""
    leaves = arrays() if leaves is None else leaves
    nodes = st.recursive(leaves, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4), max_leaves=12)
    return st.dictionaries(NAMES, nodes, min_size=1, max_size=4)


def equal(a, b) -> bool:
    """Bit for bit, with the same structure, shapes and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )
