"""Adapters by hand, for `plain_bert`: each method's equation, on dictionaries of arrays.

A method is ``dense(x, p)``, where ``p`` holds ``kernel``, ``bias`` and the method's own arrays. Quantised kernels are
unpacked inside the product, anew for the backward pass: a scan would otherwise keep them all at full size.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from plain_bert import dense

from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.groups import FROZEN
from jaxtransfer.adapt.quantized_types import NF4_LEVELS
from jaxtransfer.tree.weights import is_weight

SCALE = 2.0


def lora(x, p):
    """``x W + bias + s (x a) b``."""
    return dense(x, p) + (x @ p["a"] * SCALE) @ p["b"] if "a" in p else dense(x, p)


def dora(x, p):
    """``g (x W + s (x a) b) + bias``, ``g = m / |W + s a b|`` by columns, the norm constant."""
    v = p["kernel"] + (p["a"] * SCALE) @ p["b"]
    g = p["magnitude"] / jax.lax.stop_gradient(jnp.sqrt((v * v).sum(0)))
    return g * (x @ p["kernel"] + (x @ p["a"] * SCALE) @ p["b"]) + p["bias"]


def ia3(x, p):
    """``(x W + bias) g``, or ``(x g) W + bias``."""
    if "input_gain" in p:
        return dense(x * p["input_gain"], p)
    return dense(x, p) * p["gain"] if "gain" in p else dense(x, p)


def vera(a, b, x, p):
    """``x W + bias + ((x A) d B) e``, A and B cut to W's size."""
    inputs, outputs = p["kernel"].shape
    return dense(x, p) + ((x @ a[:inputs]) * p["d"]) @ b[:, :outputs] * p["b"]


def quantized_lora(unpack, x, p):
    """LoRA over a kernel that ``unpack`` makes of its parts."""
    product = jax.checkpoint(lambda x, parts: x @ unpack(parts), prevent_cse=False)
    return product(x, p["kernel"]) + p["bias"] + (x @ p["a"] * SCALE) @ p["b"]


def nf4(p):
    """``level[code] s`` with ``s = centre + spread c / 127``; of 64 inputs a byte holds i and, above it, i + 32."""
    blocks, out = p["scales"].shape
    c = p["scales"].astype(jnp.float32).reshape(blocks, p["spread"].shape[1], -1)
    s = (p["centre"][..., None] + p["spread"][..., None] * c / 127).reshape(blocks, 1, out)
    codes = p["codes"].reshape(blocks, -1, out)
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=1)
    return (jnp.asarray(NF4_LEVELS)[codes] * s).reshape(-1, out)


def int8(p):
    """``q s``."""
    return p["q"].astype(jnp.float32) * p["scale"]


def shared_vera(frozen):
    """VeRA with the matrices that all layers share."""
    matrices = frozen["shared"]["vera"]["default"]
    return partial(vera, matrices["a"], matrices["b"])


LINEARS = {
    "lora": lambda _: lora, "dora": lambda _: dora, "ia3": lambda _: ia3, "vera": shared_vera,
    "qlora": lambda _: partial(quantized_lora, nf4), "int8": lambda _: partial(quantized_lora, int8),
    "full": None, "bottleneck": None, "prompt": None, "prefix": None, "bitfit": None,
}  # fmt: skip
"""Method -> ``linear(frozen) -> dense``, as `plain_bert.make_step` takes it."""


def split(params, labels):
    """The library's canonical parameters, as dictionaries stacked over layers: ``(trained, frozen)``."""
    whole, marks = _parts(params), _parts(labels)
    layers = [whole["blocks"][str(i)] for i in range(len(whole["blocks"]))]
    whole = {**whole, "high": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    marks = {**marks, "high": marks["blocks"]["0"]}
    del whole["blocks"], marks["blocks"]
    return _kept(whole, marks, True), _kept(whole, marks, False) or {}


def _parts(node):
    """Leaf types as dictionaries, an adapter's arrays beside its kernel; LoRA's scale is a constant here."""
    if is_weight(node):
        names = [field.name for field in dataclasses.fields(node) if not field.metadata.get("static")]
        return {name: _parts(getattr(node, name)) for name in names}
    if not isinstance(node, dict):
        return node
    out = {}
    for name, child in node.items():
        found = _parts(child)
        if isinstance(child, Adapter):
            own = {part: value for part, value in found.items() if part not in ("base", "scale", "shared")}
            if getattr(child, "on", None) == "input":
                own = {"input_gain": own["gain"]}
            out |= {name: found["base"], **own}
        else:
            out[name] = found
    return out


def _kept(node, marks, trained):
    """What trains of a tree, or what does not; arrays are copied, because a step is given those that train."""
    if not isinstance(node, dict):
        return jnp.copy(node) if (marks != FROZEN) is trained else None
    found = {name: _kept(child, marks[name], trained) for name, child in node.items()}
    return {name: child for name, child in found.items() if child is not None} or None
