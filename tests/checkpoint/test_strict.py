"""What does not fit is refused, all of it at once and before an array is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import checkpoint, tree
from jaxtransfer.checkpoint import CheckpointError, arrays
from jaxtransfer.types import Lineage, State
from tests.checkpoint.states import CUT, RULES, abstract, make


@pytest.fixture
def saved(tmp_path):
    state, frozen, lineage = make()
    return checkpoint.save(tmp_path / "3", state, frozen, lineage), state, frozen, lineage


def test_every_disagreement_is_listed_and_nothing_is_read(saved, monkeypatch):
    path, state, frozen, lineage = saved
    monkeypatch.setattr(arrays, "read", lambda *_: pytest.fail("an array was read"))
    block = state.params["blocks"]["0:3"]
    params = {
        "blocks": {"0:3": block | {"kernel": jnp.zeros((3, 8, 5)), "bias": block["bias"].astype(jnp.bfloat16)}},
        "head": {"scale": jnp.zeros(2), "ids": None},
    }
    like = dataclasses.replace(state, params=params, step=jnp.float32(0), key=jax.random.key(0, impl="rbg"))
    rest = frozen | {"embed": {"embedding": frozen["embed"]["embedding"].astype(jnp.float32)}, "more": jnp.zeros(1)}
    with pytest.raises(tree.TreeError) as caught:
        checkpoint.restore(path, like=(like, rest), lineage=lineage)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in (
        "missing: params/head/scale",
        "missing: frozen/more",
        "extra: params/head/kernel",
        "shape of params/blocks/0:3/kernel: expected (3, 8, 5), found (3, 8, 4)",
        "dtype of params/blocks/0:3/bias: expected bfloat16, found float32",
        "dtype of step: expected float32, found int32",
        "dtype of key: expected key<rbg>, found key<fry>",
        "dtype of frozen/embed/embedding: expected float32, found bfloat16",
    ):
        assert part in message
    assert message.count(";") == 7


def test_other_layouts_are_compared_layer_by_layer(saved):
    path, _, _, _ = saved
    want, rest, _ = make(CUT)
    bad = want.params["blocks"] | {"2:3": want.params["blocks"]["2:3"] | {"bias": jnp.zeros((1, 5))}}
    like = dataclasses.replace(want, params=want.params | {"blocks": bad})
    with pytest.raises(tree.TreeError, match=r"shape of params/blocks/2/bias: expected \(5,\), found \(4,\)$"):
        checkpoint.restore(path, like=(like, rest))


def test_another_optimizer_is_refused(saved):
    path, state, frozen, _ = saved
    with pytest.raises(tree.TreeError, match="extra: opt_state@inner_states/head@inner_state/0@trace/head/kernel"):
        checkpoint.restore(path, like=(dataclasses.replace(state, opt_state=()), frozen))


def test_another_source_is_refused_naming_both(saved):
    path, state, frozen, lineage = saved
    other = dataclasses.replace(lineage, ref="hub/other", digest="0" * 64)
    with pytest.raises(CheckpointError, match=f"memory .digest {lineage.digest}.*hub/other .digest 0000"):
        checkpoint.restore(path, like=(state, frozen), lineage=other)


def test_frozen_leaves_of_another_source_are_refused(saved):
    path, state, _, _ = saved
    _, other, _ = make(seed=1)
    with pytest.raises(CheckpointError, match=r"frozen/blocks/0/norm, frozen/blocks/1/norm.*not bit-identical"):
        checkpoint.restore(path, like=(state, other))
    with pytest.raises(CheckpointError, match=r"frozen/head/ids: unchanged since the source.*pass the source's"):
        checkpoint.restore(path, like=(state, abstract(other)))


def test_a_state_alone_is_enough_unless_frozen_leaves_were_written(saved, tmp_path):
    path, state, frozen, lineage = saved
    assert checkpoint.restore(path, like=state)[1] is None
    changed = frozen | {"head": {"kernel": None, "ids": frozen["head"]["ids"] + 1}}
    path = checkpoint.save(tmp_path / "4", state, changed, lineage)
    with pytest.raises(tree.TreeError, match=r"extra: frozen/head/ids$"):
        checkpoint.restore(path, like=state)


def test_what_cannot_be_saved_is_named(tmp_path):
    state, frozen, lineage = make()
    with pytest.raises(CheckpointError, match="terms/margin: a float is no array"):
        checkpoint.save(tmp_path / "1", dataclasses.replace(state, terms={"margin": 0.5}), frozen, lineage)
    with pytest.raises(CheckpointError, match="two leaves have the same name, terms/a/b"):
        twice = {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}
        checkpoint.save(tmp_path / "1", dataclasses.replace(state, terms=twice), frozen, lineage)
    with pytest.raises(CheckpointError, match="extra cannot be written as JSON: ndarray"):
        checkpoint.save(tmp_path / "1", state, frozen, lineage, extra={"x": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_rules_need_a_mesh(saved):
    path, state, frozen, _ = saved
    with pytest.raises(CheckpointError, match="rules without a mesh"):
        checkpoint.restore(path, like=(abstract(state), frozen), sharding=RULES)


def test_a_folder_that_holds_something_is_not_overwritten(saved, tmp_path):
    path, state, frozen, lineage = saved
    with pytest.raises(CheckpointError, match="exists already and is not empty"):
        checkpoint.save(path, state, frozen, lineage)
    (tmp_path / "empty").mkdir()
    checkpoint.verify(checkpoint.save(tmp_path / "empty", state, frozen, lineage))


def test_names_never_become_paths(tmp_path):
    names = ["../../evil", "/etc/evil", "a" * 300, "\x00", "\x1b[31m", "..", "."]
    state = State(jnp.int32(0), {name: jnp.ones(1) for name in names}, {}, (), jax.random.key(0), {})
    path = checkpoint.save(tmp_path / "in" / "0", state, {}, Lineage("memory", "d"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    assert [entry.name for entry in path.parent.iterdir()] == ["0"]
    found, _, _ = checkpoint.restore(path, like=state)
    assert found.params.keys() == set(names)
