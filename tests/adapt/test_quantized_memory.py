"""What a step over a quantised or uncast base holds: the packed leaves, one layer unpacked, and no copy of all layers.

Everything is abstract: the sizes are such that weights dominate, and none is drawn.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import plan
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import groups
from jaxtransfer.adapt.quantized import METHODS, abstract, quantized
from jaxtransfer.models import family, init
from jaxtransfer.models.api import abstract_init
from jaxtransfer.objectives import language_model
from jaxtransfer.step import init_state, make_step
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.types import Head, Lineage, Source
from tests import tiny

LAYERS, WIDTH, INNER = 8, 512, 1536
RAW = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
}
KERNELS = r"blocks/\d+/\w+/\w+/kernel"
WEIGHTS = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
"""Of the kernels of one layer."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A base: how it is quantised (None: it is not), its dtype, that of activations; rematerialisation."""

    method: str | None
    base: type = jnp.float32
    precision: type = jnp.float32
    remat: str | None = None

    def __str__(self):
        names = (self.method, jnp.dtype(self.base).name, jnp.dtype(self.precision).name, self.remat)
        return "-".join(str(name) for name in names)


LORA = at.lora(8)


def traced(case, *, make=LORA, device=None):
    """The training step of two rows of sixteen tokens."""
    model = family("llama").build(RAW, Head("causal-lm"))

    def build(key):
        flat = flatten(jax.tree.map(lambda x: x.astype(case.base), init(model, key)))
        for path in flat if case.method else ():
            flat[path] = quantized(path, flat[path], case.method) if re.fullmatch(KERNELS, path) else flat[path]
        source = Source(model, unflatten(flat), Lineage("memory", ""))
        return at.attach(source, [(KERNELS, make)], key).params

    params = jax.eval_shape(build, jax.random.key(0))
    labels = groups.labels_of(model, groups.adapters(model), params)
    tx = tiny.transform(labels)
    start = jax.eval_shape(lambda params, key: init_state(model, params, labels, tx, key), params, jax.random.key(1))
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("input_ids", "attention_mask", "labels")}
    batch |= {"weight": jax.ShapeDtypeStruct((2,), jnp.float32)}
    step = make_step(model, language_model(), tx, precision=case.precision, remat=case.remat)
    where = None if device is None else jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (*start, batch))
    return step.trace(*placed)


def saved(jaxpr) -> Iterator[jax.core.ShapedArray]:
    """What scans give layer by layer: what the forward pass keeps for the backward, and the gradients."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            layer = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
            pairs = zip(equation.outvars, layer.outvars, strict=True)
            yield from (out.aval for out, own in pairs if out.aval.ndim > own.aval.ndim)  # the others are carried
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from saved(inner)


def bytes_of(avals):
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


@pytest.mark.parametrize("method", [None, "int8", "nf4"])
@pytest.mark.parametrize("precision", [jnp.float32, jnp.bfloat16])
def test_no_residual_of_a_scan_is_as_large_as_a_stacked_kernel(method, precision):
    """Neither unpacked, nor as codes or truth values, nor cast to the dtype of activations."""
    for make in (LORA, at.dora(8)):
        found = list(saved(traced(Case(method, precision=precision), make=make).jaxpr.jaxpr))
        assert len(found) > 30  # activations, and gradients of 14 adapters' parts
        assert max(math.prod(aval.shape) for aval in found) < LAYERS * WIDTH * WIDTH / 4


FULL = pytest.mark.slow
CASES = [
    Case("nf4"),
    Case("nf4", precision=jnp.bfloat16),
    Case("int8", precision=jnp.bfloat16),
    Case(None, precision=jnp.bfloat16),
    pytest.param(Case("nf4", jnp.bfloat16, jnp.bfloat16), marks=FULL),
    pytest.param(Case("int8"), marks=FULL),
    *(pytest.param(Case(how, remat=remat), marks=FULL) for how in METHODS for remat in ("full", "dots")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_temporaries_are_what_is_saved_and_a_layer_or_two(case):
    trace = traced(case)
    memory = trace.lower().compile().memory_analysis()
    kept = bytes_of(saved(trace.jaxpr.jaxpr))
    one = 4 * WEIGHTS  # unpacked, in float32
    assert memory.temp_size_in_bytes <= kept + 2 * one, f"{memory.temp_size_in_bytes / 1e6:.1f} MB, {kept / 1e6:.1f}"
    assert kept + 2 * one < LAYERS * WEIGHTS * 2  # a copy of all layers, even in bfloat16 and with nothing beside it


@pytest.fixture(scope="module")
def tpu():
    """A TPU for its compiler alone."""
    return plan.devices(plan.topology("v5e:2x2"))[0]


@pytest.mark.tpu
@pytest.mark.parametrize(
    "case",
    [Case("nf4", precision=jnp.bfloat16), *(pytest.param(case, marks=FULL) for case in
     (Case("nf4"), Case("nf4", precision=jnp.bfloat16, remat="full"), Case("int8", precision=jnp.bfloat16),
      Case(None, precision=jnp.bfloat16), Case(None, jnp.bfloat16, jnp.bfloat16)))],
    ids=str,
)  # fmt: skip
def test_a_tpu_unpacks_into_the_product(case, tpu):
    """What is there beside what is saved is less than one layer unpacked, and the one gather is the embedding's."""
    trace = traced(case, device=tpu)
    compiled = trace.lower().compile()
    kept = bytes_of(saved(trace.jaxpr.jaxpr))
    size = jnp.dtype(case.precision).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < kept + WEIGHTS * size
    assert len(re.findall(r"= \S+ gather\(", compiled.as_text())) <= 1


@pytest.mark.parametrize("method, shape", [("int8", (8192, 512)), ("nf4", (4096, 512))])
def test_quantising_bfloat16_makes_no_float32_copy(method, shape):
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    compiled = jax.jit(METHODS[method]).lower(leaf).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * math.prod(shape) * 4
    assert jax.tree.map(jnp.shape, compiled.out_info) == jax.tree.map(jnp.shape, abstract("kernel", leaf, method))


def test_a_quantised_model_needs_at_most_056_byte_a_parameter_and_its_whole_is_told():
    """Llama-3-8B, abstract: 6.98 of 8.03 billion parameters are in the blocks' kernels."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    raw = RAW | sizes | {"intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192}
    flat = flatten(abstract_init(family("llama").build(raw | {"tie_word_embeddings": False}, Head("causal-lm"))))
    chosen = {path: leaf for path, leaf in flat.items() if re.fullmatch(KERNELS, path)}
    count = sum(math.prod(leaf.shape) for leaf in chosen.values())
    packed = bytes_of(jax.tree.leaves([abstract(path, leaf, "nf4") for path, leaf in chosen.items()]))
    assert count == 32 * 218_103_808
    assert packed / count == pytest.approx(0.5 + 1 / 64 + 8 / 64**2, abs=1e-9) and packed / count <= 0.56
    rest = 2 * sum(math.prod(leaf.shape) for path, leaf in flat.items() if path not in chosen)
    assert (packed + rest) / 1e9 == pytest.approx(5.71, abs=0.01)  # against 16.06 in bfloat16
    inputs = {np.prod(leaf.shape[:-1]) for leaf in chosen.values()}
    eights = bytes_of(jax.tree.leaves([abstract(path, leaf, "int8") for path, leaf in chosen.items()]))
    assert 1 < eights / count <= 1 + 4 / min(inputs)
