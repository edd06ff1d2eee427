"""Random adapted weights and a tiny model of every kind of weight: what the properties of adapters are tested on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt.adapter_types import IA3, Adapter, DoRA, LoRA
from jaxtransfer.adapt.quantized import quantize
from jaxtransfer.adapt.vera import VeRA
from jaxtransfer.models import family, init
from jaxtransfer.tree import digest, fingerprint, unflatten
from jaxtransfer.tree.weights import Window, conv, is_weight, linear, materialize, take, transpose, with_shared
from jaxtransfer.types import Lineage, Model, Source, Stage
from tests.models import zoo

KEY = jax.random.key(0)
MAKES = {
    "lora": lambda rank: at.lora(rank, alpha=3.0),
    "rslora": lambda rank: at.lora(rank, alpha=3.0, rank_stabilized=True),
    "dora": lambda rank: at.dora(rank, alpha=2.0),
    "ia3": lambda rank: at.ia3(),
    "ia3-input": lambda rank: at.ia3("input"),
    "vera": lambda rank: at.vera(rank, d=0.5),
}
DEFINED = {
    "dense": tuple(MAKES),
    "conv": ("lora", "rslora", "dora", "ia3", "ia3-input"),
    "embedding": ("lora", "rslora"),
}
EXACT = {"lora", "rslora", "ia3", "ia3-input", "vera"}
"""Methods whose function is unchanged at the start bit for bit; DoRA divides by a norm and multiplies by it again."""
PACKED = {"dense": (None, "int8", "nf4"), "conv": (None, "int8"), "embedding": (None, "int8")}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def of(params):
    """A source of bare parameters."""
    return Source(Model("foreign", None, (), {}), params, Lineage("memory", ""))


def moved(tree, seed=1):
    """A tree whose adapters are as if trained: every trainable part of each, also of inner ones, has moved."""
    rng = np.random.default_rng(seed)

    def move(node):
        if not isinstance(node, Adapter):
            return node
        new = {p: getattr(node, p) for p in node.trainable}
        new = {p: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for p, x in new.items()}
        return dataclasses.replace(node, base=move(node.base), **new)

    return jax.tree.map(move, tree, is_leaf=is_weight)


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight with adapters on top of one another, over a base that may be packed; ``kind`` is its layer's."""

    kind: str
    shape: tuple[int, ...]
    base: str | None
    methods: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def path(self):
        return "w/embedding" if self.kind == "embedding" else "w/kernel"

    @functools.cached_property
    def plain(self):
        """The base, as a source."""
        source = of(self.with_weight(normal(*self.shape), normal(self.shape[-1], seed=1)))
        return quantize(source, [(self.path, self.base)]) if self.base else source

    def attached(self):
        """With the adapters, just made."""
        source = self.plain
        for i, (method, rank) in enumerate(zip(self.methods, self.ranks, strict=True)):
            source = at.attach(source, [(self.path, MAKES[method](rank))], jax.random.key(i), name=f"a{i}")
        return source

    def weight(self, params):
        """The weight as a run gives it to a layer, and its bias."""
        node = with_shared(params["w"][self.path.split("/")[1]], params.get("shared", {}))
        return node, params["w"]["bias"]

    def with_weight(self, node, bias):
        """Parameters with this weight."""
        return {"w": {self.path.split("/")[1]: node, "bias": bias}}

    def run(self, params, lead=(2, 3)):
        """What the weight's layer makes of a fixed input, and, for an embedding, what a tied head does."""
        node, bias = self.weight(params)
        if self.kind == "dense":
            return linear(normal(*lead, self.shape[0], seed=2), node, bias)
        if self.kind == "conv":
            how = Window((2, 1), ((1, 1), (0, 1)))
            return conv(normal(2, 5, 4, self.shape[2], seed=2), node, bias, how=how)
        ids = jnp.arange(6).reshape(2, 3) % self.shape[0]
        found = take(node, ids, jnp.float32)
        return jnp.concatenate([found.ravel(), linear(normal(2, self.shape[1], seed=2), transpose(node)).ravel()])


_SHAPES = {
    "dense": ((8, 6), (1, 4)),
    "conv": ((3, 2, 4, 6), (1, 1, 5, 3)),
    "embedding": ((8, 6), (7, 1)),
}
"""Few, so that what is compiled for one example serves the next; `cases(any_shape=True)` draws any."""


@st.composite
def cases(draw, depth=2, any_shape=False):
    """A weight of any kind under up to ``depth`` adapters."""
    kind = draw(st.sampled_from(("dense", "dense", "conv", "embedding")))
    base = draw(st.sampled_from(PACKED[kind]))
    shape = draw(st.sampled_from(_SHAPES[kind]))
    if any_shape:
        shape = (*(draw(st.integers(1, 3)) for _ in shape[:-2]), *(draw(st.integers(1, 9)) for _ in "io"))
    if base == "nf4":
        shape = (64 * draw(st.integers(1, 2 if any_shape else 1)), shape[-1])
    methods = tuple(draw(st.lists(st.sampled_from(DEFINED[kind]), min_size=1, max_size=depth)))
    ranks = tuple(draw(st.sampled_from([r for r in (1, 3, 8) if r <= min(shape[-2:])])) for _ in methods)
    return Case(kind, shape, base, methods, ranks)


def formula(node, bias):
    """``(W, bias)`` that a node stands for, by the papers' equations alone; differentiable in every part."""
    if not isinstance(node, Adapter):
        return materialize(node), bias
    w, bias = formula(node.base, bias)
    if isinstance(node, IA3):
        axis, bias = (-2, bias) if node.on == "input" else (-1, bias * node.gain)
        return w * jnp.expand_dims(node.gain, [i for i in range(w.ndim) if i != w.ndim + axis]), bias
    if isinstance(node, VeRA):
        a, b = node.shared["a"][: w.shape[0]], node.shared["b"][:, : w.shape[1]]
        return w + a @ jnp.diag(node.d) @ b @ jnp.diag(node.b), bias
    assert isinstance(node, LoRA)
    v = w + node.scale * jnp.einsum("...r,ro->...o", node.a, node.b)
    if isinstance(node, DoRA):
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, axis=tuple(range(v.ndim - 1)), keepdims=True)))
        v = v / norm * node.magnitude.reshape((1,) * (v.ndim - 1) + (-1,))
    return v, bias


ENCODERS = {
    "bert": zoo.TINY,
    "roberta": zoo.TINY | {"pad_token_id": 1},
    "distilbert": {"vocab_size": 31, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12,
                   "max_position_embeddings": 16, "initializer_range": 0.3},
}  # fmt: skip


@functools.cache
def encoder(name, head):
    """A made-up model of the BERT family under a head, its parameters fresh."""
    model = family(name).build(ENCODERS[name], head)
    return Source(model, init(model, KEY), Lineage("memory", ""))


SIZES = {"words": 8, "width": 64, "wide": 128, "channels": 3}


@functools.cache
def toy(layers=4):
    """A model with an embedding that its head reads behind a kernel of its own, and, in scanned layers, others."""
    words, d, wide = SIZES["words"], SIZES["width"], SIZES["wide"]

    def embed(params, carry, key):
        x = conv(carry["pixels"], params["patch"]["kernel"], params["patch"]["bias"], key, Window((2, 2)))
        hidden = take(params["word"]["embedding"], carry["ids"])
        return {"hidden": hidden + x.mean((1, 2))[:, None, :]}

    def block(params, carry, key):
        x = carry["hidden"]
        mixed = conv(x[:, None], params["mix"]["kernel"], params["mix"]["bias"], key, Window(padding=((0, 0), (1, 1))))
        up = jnp.tanh(linear(x + 0.3 * mixed[:, 0], params["up"]["kernel"], params["up"]["bias"], key))
        return {"hidden": x + linear(up, params["down"]["kernel"], params["down"]["bias"], key)}

    def dense(params, carry, key):
        return {"hidden": linear(carry["hidden"], params["kernel"], params["bias"], key)}

    def word(params, carry, key, table):
        return {"logits": linear(carry["hidden"], transpose(table))}

    def fresh(shapes):
        def init(key):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            drawn = {path: rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5 for path, shape in shapes.items()}
            return unflatten({path: jnp.asarray(value, jnp.float32) for path, value in drawn.items()})

        return init

    inside = {"up/kernel": (d, wide), "up/bias": (wide,), "down/kernel": (wide, d), "down/bias": (d,)}
    inside |= {"mix/kernel": (1, 3, d, d), "mix/bias": (d,)}
    first = {"word/embedding": (words, d), "patch/kernel": (2, 2, SIZES["channels"], d), "patch/bias": (d,)}
    stages = (
        Stage("embed", embed, fresh(first)),
        *(Stage(f"blocks/{i}", block, fresh(inside)) for i in range(layers)),
        Stage("head/dense", dense, fresh({"kernel": (d, d), "bias": (d,)})),
        Stage("head/word", word, lambda key: {}, writes=("logits",), reads=("embed/word/embedding",)),
    )
    model = Model("toy", None, stages, {"hidden": "hidden", "logits": "logits"})
    params = init(model, KEY)
    return Source(model, params, Lineage("memory", digest(params), fingerprints=fingerprint(params)))


def toy_batch(rows=8):
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, SIZES["words"], (rows, 4)).astype(np.int32),
        "pixels": rng.normal(size=(rows, 4, 4, SIZES["channels"])).astype(np.float32),
        "target": rng.normal(size=(rows, 4, SIZES["words"])).astype(np.float32),
    }


def squares(view):
    """The objective of the tiny model."""
    return jnp.mean((view.outputs["logits"] - view.batch["target"]) ** 2), {"weight": jnp.float32(1)}


LEAVES = {
    r"embed/word/embedding": "embedding",
    r"embed/patch/kernel": "conv",
    r"blocks/\d/up/kernel": "dense",
    r"blocks/[01]/down/kernel": "dense",
    r"blocks/[23]/down/kernel": "dense",
    r"blocks/\d/mix/kernel": "conv",
    r"head/dense/kernel": "dense",
}
"""The kinds of the tiny model's weights; the layers' second kernels may be adapted in two ways: two stacks."""


@st.composite
def adapted_toys(draw, depth=2):
    """The tiny model under random adapters, over random quantised bases: as made, and as if trained."""
    source, packed = toy(), {}
    for leaf, kind in LEAVES.items():
        if base := draw(st.sampled_from(PACKED[kind])):
            packed[leaf] = base
    source = quantize(source, list(packed.items())) if packed else source
    base = source
    for i in range(draw(st.integers(1, depth))):
        chosen = {leaf: draw(st.sampled_from((None, *DEFINED[kind]))) for leaf, kind in LEAVES.items()}
        if not any(chosen.values()):
            chosen[r"blocks/\d/up/kernel"] = "lora"
        rank = draw(st.sampled_from((1, 2, 3)))
        rules = [(leaf, MAKES[method](rank)) for leaf, method in chosen.items() if method]
        source = at.attach(source, rules, jax.random.key(i), name=f"a{i}")
    return base, dataclasses.replace(source, params=moved(source.params))
