"""A checkpoint of adapters is a delta: what trains and its optimizer, bound to the source that it is a delta to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import checkpoint, tree
from jaxtransfer.adapt import adapters, attach, groups, quantize
from jaxtransfer.checkpoint import CheckpointError
from jaxtransfer.step import params_of
from tests import tiny
from tests.checkpoint.states import assert_same, files, lineage_of

KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "initializer_range": 0.02}
METHODS = ["lora", "qlora"]


@functools.cache
def based(seed=0):
    """A classifier wide enough for its adapters to outweigh a manifest, known by the digest of its parameters."""
    source = tiny.source(**WIDE)
    params = jax.tree.map(lambda leaf: leaf + seed, source.params)
    return dataclasses.replace(source, params=params, lineage=lineage_of(params))


def adapted(method, base):
    """The base under adapters."""
    base = quantize(base, [(KERNELS, "nf4")]) if method == "qlora" else base
    make = adapters.ia3() if method == "ia3" else adapters.lora(16)
    return attach(base, [(KERNELS, make)], jax.random.key(0))


def started(source, key=2):
    state, frozen, _ = tiny.start(source, groups.adapters(source.model), key=key)
    return state, frozen


def trained(state):
    """Every float drawn anew, which no compression makes smaller than what was trained."""
    draw = np.random.default_rng(0)

    def other(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(draw.normal(size=leaf.shape).astype(np.float32)) if is_float else leaf

    params, moments = jax.tree.map(other, (state.params, state.opt_state))
    return dataclasses.replace(state, params=params, opt_state=moments)


def size(values):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(values))


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory):
    """Of each method: its name, its checkpoint, and what was saved."""
    source = adapted(request.param, based())
    state, frozen = started(source)
    state = trained(state)
    path = checkpoint.save(tmp_path_factory.mktemp(request.param) / "3", state, frozen, source.lineage)
    return request.param, path, state, frozen


def test_it_holds_what_trains_and_its_optimizer_and_five_per_cent_more(saved):
    _, path, state, frozen = saved
    needed, written = size((state.params, state.opt_state)), sum(file.stat().st_size for file in files(path))
    assert needed < written <= 1.05 * needed
    leaves = checkpoint.metadata(path)["leaves"]
    of_frozen = {name for name, leaf in leaves.items() if name.startswith("frozen/") and leaf["written"]}
    assert of_frozen and all(name.endswith("@scale") for name in of_frozen)  # a number of each adapter, none of a base
    assert {name for name in leaves if name.startswith("params/")} == {
        f"params/{p}" for p in tree.flatten(state.params)
    }
    assert size(frozen) > needed / 2


def test_the_same_source_adapted_anew_takes_it(saved):
    method, path, state, frozen = saved
    again = adapted(method, based())
    fresh, still = started(again, key=9)
    found, kept, _ = checkpoint.restore(path, like=(fresh, still), lineage=again.lineage)
    assert_same((found, kept), (state, frozen))
    assert tiny.same_bits(params_of(found, kept), params_of(state, frozen))


def test_another_source_is_refused_by_its_digest_and_by_its_bits(saved):
    method, path, _, _ = saved
    other = adapted(method, based(seed=1))
    fresh, still = started(other)
    with pytest.raises(CheckpointError, match=f"digest {based().lineage.digest}.*the source here is .*load the source"):
        checkpoint.restore(path, like=(fresh, still), lineage=other.lineage)
    with pytest.raises(CheckpointError, match=r"@base.*not bit-identical to its source"):
        checkpoint.restore(path, like=(fresh, still))


def test_of_the_smallest_adapters_too_little_else_is_written(tmp_path):
    """(IA)3 on a model of some hundred leaves: 65 kB train or follow what trains."""
    source = adapted("ia3", based())
    state, frozen = started(source)
    path = checkpoint.save(tmp_path / "3", trained(state), frozen, source.lineage)
    needed = size((state.params, state.opt_state))
    assert needed < 70_000 and sum(file.stat().st_size for file in files(path)) - needed < 6_000


def test_the_same_source_packed_otherwise_or_not_is_refused(saved):
    method, path, _, _ = saved
    other = adapted(next(name for name in METHODS if name != method), based())
    with pytest.raises(tree.TreeError, match=r"frozen/blocks/.*/kernel@base"):
        checkpoint.restore(path, like=started(other), lineage=other.lineage)


def test_a_frozen_leaf_that_was_trained_before_is_part_of_the_delta(saved, tmp_path):
    method, _, _, _ = saved
    source = adapted(method, based())
    source.params["embed"]["norm"]["scale"] += 1
    state, frozen = started(source)
    path = checkpoint.save(tmp_path / "1", state, frozen, source.lineage)
    leaves = checkpoint.metadata(path)["leaves"]
    written = {name for name, leaf in leaves.items() if name.startswith("frozen/") and leaf["written"]}
    assert {name for name in written if "@" not in name} == {"frozen/embed/norm/scale"}
