"""The frozen prefix: where it ends, what is kept, and that training on what it gave is the same training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import adapters, attach, groups, heads, swap_head, untie
from jaxtransfer.data.loader import Examples, batches, collate
from jaxtransfer.features import FeatureError, Pass, frozen_prefix, frozen_stages, kept
from jaxtransfer.models import from_function
from jaxtransfer.models import init as fresh
from jaxtransfer.models.registry import family
from jaxtransfer.objectives import cross_entropy, language_model
from jaxtransfer.objectives.losses import IGNORE
from jaxtransfer.optim import Group
from jaxtransfer.parallel import make_mesh, splash
from jaxtransfer.step import init_state, make_step, shard_batch
from jaxtransfer.types import Lineage, Source, View
from tests import language, tiny

BATCH, BUCKETS = 4, (8, 16)
SMALL = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.1}
SGD = Group("sgd", lr=0.1, weight_decay=0.0)  # Adam would blow the noise of gradients that are zero up to its rate


def texts(count=14, vocabulary=64, labels="classes", seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, vocabulary, n).astype(np.int32) for n in rng.integers(2, 16, count)]
    if labels == "tokens":
        return Examples(
            ragged={"input_ids": rows, "labels": [np.roll(row, -1) for row in rows]}, pad={"labels": IGNORE}
        )
    return Examples(ragged={"input_ids": rows}, fixed={"labels": np.arange(count, dtype=np.int32) % 3})


def uses(objective):
    def read(params, outputs, batch):
        view = View(params, outputs, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return objective(view), outputs["logits"]

    return read


def prefix(source, rules, examples, objective=None, **options):
    labels = groups.labels_of(source.model, rules, source.params)
    how = {"length": max(BUCKETS) if examples.ragged else 0} | options
    return frozen_prefix(source.model, source.params, labels, examples, uses(objective or cross_entropy()), **how)


def trained(
    source, rules, examples, objective, *, buckets=BUCKETS[1:], folder=None, mesh=None, sharding=(), attend=None
):
    """Parameters and losses of a training with all stages, and of one on what the frozen ones gave."""
    labels = groups.labels_of(source.model, rules, source.params)
    tx = tiny.transform(labels, SGD, clip=1.0)
    where = {"mesh": mesh, "sharding": sharding}
    state, frozen = init_state(source.model, source.params, labels, tx, jax.random.key(3), **where)
    found = prefix(source, rules, examples, objective, attend=attend)
    once = Pass(found, frozen, BATCH, buckets, mesh, sharding)
    store = once.store(examples, folder)
    once.fill(store, examples)
    out = []
    for model, rows in ((source.model, examples), (found.rest(), kept(examples, store))):
        step, now = make_step(model, objective, tx, donate=False, attend=attend, **where), state
        data = batches(rows, batch=BATCH, buckets=buckets, shuffle=True, seed=1)
        seen = []
        for _ in range(6):
            now, metrics = step(now, frozen, shard_batch(next(data), mesh))
            seen.append(float(metrics["loss"]))
        out.append((now.params, seen, data.state()))
    return found, *out


def check(one, other, atol=1e-6):
    assert one[2] == other[2]  # batches, and a position in them, are the same
    assert np.allclose(one[1], other[1], atol=atol) and not np.allclose(one[1][0], one[1][-1], atol=1e-4)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        assert np.allclose(a, b, atol=atol)


def test_a_head_needs_the_pooled_rows_alone():
    source = tiny.source(**SMALL)
    found, one, other = trained(source, groups.head_only(source.model), texts(), cross_entropy())
    assert found.stop == "pooler" and [*found.entries] == ["pooler_output"] and found.free == ()
    check(one, other)


def test_upper_blocks_go_on_with_the_same_dropout_from_files(tmp_path):
    source = tiny.source(**SMALL)
    rules = groups.last(source.model, 1)
    found, one, other = trained(source, rules, texts(), cross_entropy(), buckets=BUCKETS, folder=tmp_path)
    assert found.stop == "blocks/0" and found.entries["hidden"].ragged and found.free == ("mask",)
    check(one, other)


def test_a_decoder_makes_its_masks_and_tables_again():
    source = untie(language.decoder())
    rules = groups.last(source.model, 1)
    found, one, other = trained(source, rules, texts(labels="tokens"), language_model())
    assert [*found.entries] == ["hidden"] and {"mask", "cos", "sin"} <= {*found.free}
    check(one, other)


def test_a_kernel_finds_what_it_reads_beside_the_mask():
    source = untie(language.decoder())
    how = (source, groups.last(source.model, 1), texts(labels="tokens"), language_model())
    assert "segments" not in prefix(*how).free
    assert {"mask", "segments", "cos", "sin"} <= {*prefix(*how, attend=splash()).free}


@pytest.mark.slow
def test_a_kernel_gives_the_same_behind_what_was_computed_once():
    source = untie(language.decoder())
    how = (source, groups.last(source.model, 1), texts(labels="tokens"), language_model())
    _, one, other = trained(*how, attend=splash(interpret=True))
    check(one, other)


def test_a_mesh_gives_what_one_device_gives(devices):
    mesh = make_mesh(data=2, fsdp=2, devices=devices[:4])
    rules = [(r".*/kernel", jax.sharding.PartitionSpec("fsdp")), (".*", jax.sharding.PartitionSpec())]
    source = tiny.source(**SMALL)
    recipe = groups.last(source.model, 1)
    _, one, other = trained(source, recipe, texts(), cross_entropy(), mesh=mesh, sharding=rules)
    check(one, other, atol=2e-6)


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Noise; counts how often it is made."""

    made: list
    random: bool = False
    ragged = ()

    @property
    def padding(self):
        return {"pixel_values": np.zeros((8, 8, 1), np.float32)}

    def __len__(self):
        return 10

    def digest(self):
        return "noise"

    def __call__(self, index, key):
        self.made.append(index)
        return {"pixel_values": np.random.default_rng(index).normal(size=(8, 8, 1)).astype(np.float32)}


def pictures(**options):
    made = Pictures([], **options)
    return made, Examples(fixed={"labels": np.arange(10, dtype=np.int32) % 2}, lazy=made)


def resnet():
    raw = {"model_type": "cifar-resnet", "depth": 8, "num_channels": 1, "hidden_sizes": [4, 6, 8]}
    model = family("cifar-resnet").build(raw, None)
    bare = Source(model, fresh(model, jax.random.key(0)), Lineage("memory", ""), {"config": raw})
    return swap_head(bare, heads.Head("image-classification", ("a", "b")), jax.random.key(1))


def test_images_are_made_once_and_padding_repeats_them():
    source, (made, examples) = resnet(), pictures()
    found = prefix(source, groups.head_only(source.model), examples)
    assert [*found.entries] == ["pooler_output"] and [*found.lazy] == ["pixel_values"]
    once = Pass(found, source.params, BATCH)
    store = once.store(examples, None)
    once.fill(store, examples)
    assert sorted(set(made.made)) == list(range(10))
    seen = len(made.made)
    rows = kept(examples, store)
    assert rows.digest() == examples.digest()
    batch = batches(rows, batch=BATCH, shuffle=False, epochs=1).batch(2)  # examples 8 and 9, and two rows of padding
    assert batch["index"].tolist() == [8, 9, -1, -1] and len(made.made) == seen
    assert np.array_equal(batch["pooler_output"][2:], batch["pooler_output"][:2])
    assert "pixel_values" not in batch


def test_what_is_new_in_every_epoch_is_not_kept():
    source, (_, examples) = resnet(), pictures(random=True)
    with pytest.raises(FeatureError, match="pixel_values are augmented: new in every epoch"):
        prefix(source, groups.head_only(source.model), examples)


def test_a_field_that_is_read_behind_the_prefix_is_told():
    source, (_, examples) = resnet(), pictures()

    def looks(view):
        return jnp.mean(view.batch["pixel_values"]) + cross_entropy()(view)[0], {}

    with pytest.raises(FeatureError, match="pixel_values is read behind pooler"):
        prefix(source, groups.head_only(source.model), examples, looks)


def test_the_prefix_ends_at_the_first_stage_that_trains_or_reads_what_trains():
    source = tiny.source()
    labels = groups.labels_of(source.model, [("blocks/2/mlp/.*", "trunk"), (".*", "frozen")], source.params)
    assert frozen_stages(source.model, labels) == (3, "blocks/2/mlp/down/bias")
    lora = attach(source, [("blocks/1/attention/query/kernel", adapters.lora(2))], jax.random.key(0))
    labels = groups.labels_of(lora.model, groups.adapters(lora.model), lora.params)
    assert frozen_stages(lora.model, labels) == (2, "blocks/1/attention/query/kernel@a")
    tied = swap_head(tiny.trunk(), heads.masked_lm(), jax.random.key(0))
    labels = groups.labels_of(tied.model, [("embed/word/.*", "trunk"), (".*", "frozen")], tied.params)
    assert frozen_stages(tied.model, labels) == (0, "embed/word/embedding")
    vera = attach(source, [("blocks/2/.*/kernel", adapters.vera(2))], jax.random.key(0))
    labels = groups.labels_of(vera.model, [("shared/.*", "adapter"), (".*", "frozen")], vera.params)
    assert frozen_stages(vera.model, labels)[0] == 0


def test_statistics_that_move_end_it():
    source = resnet()
    live = [(".*norm.*/(mean|var)", "stats"), ("head/.*", "head"), (".*", "frozen")]
    labels = groups.match(live, source.params)  # a layer's statistics move although the rest of it is frozen
    count, path = frozen_stages(source.model, labels)
    assert count == 0 and path.startswith("embed/")


def test_a_model_of_ones_own_is_cached_where_rows_have_one_length():
    parts = {"body": lambda p, x: jnp.tanh(x @ p["w"]), "head": lambda p, x: x @ p["w"]}
    params = {"body": {"w": jnp.eye(3)}, "head": {"w": jnp.ones((3, 2))}}
    source = from_function(parts, params)
    fixed = Examples(fixed={"inputs": np.ones((5, 3), np.float32), "labels": np.zeros(5, np.int32)})
    assert prefix(source, [("head/.*", "head"), (".*", "frozen")], fixed).stop == "body"
    ragged = Examples(ragged={"inputs": [np.ones((n, 3), np.float32) for n in (2, 3)]})
    with pytest.raises(FeatureError, match="may look at padding"):
        prefix(source, [("head/.*", "head"), (".*", "frozen")], ragged)


def test_nothing_or_all_that_trains_is_refused():
    source = tiny.source()
    with pytest.raises(FeatureError, match="nothing trains"):
        prefix(source, [(".*", "frozen")], texts())
    with pytest.raises(FeatureError, match="training reaches down to blocks/0/"):
        prefix(source, [("embed/.*", "frozen"), (".*", "trunk")], texts())


def test_ragged_rows_are_padded_to_the_batch():
    source = tiny.source()
    found = prefix(source, groups.last(source.model, 2), texts(3))
    once = Pass(found, source.params, BATCH, BUCKETS)
    store = once.store(texts(3), None)
    once.fill(store, texts(3))
    batch = collate(kept(texts(3), store), np.array([1, -1]), 16)
    length = len(texts(3).ragged["input_ids"][1])
    assert batch["hidden"].shape == (2, 16, 16) and batch["hidden"][0, :length].any(axis=-1).all()
    assert not batch["hidden"][0, length:].any() and not batch["hidden"][1].any()
