"""The forms that adapters have in PEFT's folders, both ways: LoRA, DoRA, (IA)3, VeRA."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer.adapt.adapter_types import IA3, Adapter, DoRA, LoRA
from jaxtransfer.adapt.vera import VeRA
from jaxtransfer.source.peft_config import PeftError, is_feedforward, of_pattern
from jaxtransfer.tree.paths import Params
from jaxtransfer.tree.weights import SHARED

PARTS = r"lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|vera_lambda_[bd]"
"""What a tensor of an adapter is called behind its module's name."""
VERA = ("base_model.vera_A", "base_model.vera_B")


def tensors_of(path: str, node: Adapter) -> dict[str, np.ndarray]:
    """Their tensors of an adapter, by the last part of their names."""
    if isinstance(node, IA3):
        gain = np.asarray(node.gain)
        if node.rank_of_base == 4:
            return {"ia3_l": gain.reshape(1, -1, 1, 1)}
        return {"ia3_l": gain[None, :] if node.on == "input" else gain[:, None]}
    if isinstance(node, VeRA):
        return {"vera_lambda_d": np.asarray(node.d), "vera_lambda_b": np.asarray(node.b)}
    assert isinstance(node, LoRA)
    a, b = np.asarray(node.a), np.asarray(node.b)
    if path.endswith("/embedding"):
        return {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    if node.rank_of_base == 4:
        out = {"lora_A.weight": a.transpose(3, 2, 0, 1), "lora_B.weight": b.T[:, :, None, None]}
    else:
        out = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if isinstance(node, DoRA):
        m = np.asarray(node.magnitude)
        out["lora_magnitude_vector"] = m if node.rank_of_base == 2 else m[None, :, None, None]
    return out


def fields_of(adapted: Mapping[str, Adapter], modules: Mapping[str, str]) -> dict[str, Any]:
    """The fields of their configuration that say what the adapters are; ``modules``: path -> their module."""
    record: dict[str, Any] = {"target_modules": sorted(modules.values())}
    first = next(iter(adapted.values()))
    rate = _rate(adapted)
    if isinstance(first, IA3):
        inputs = sorted(modules[path] for path, node in adapted.items() if isinstance(node, IA3) and node.on == "input")
        return {**record, "peft_type": "IA3", "feedforward_modules": inputs}
    if isinstance(first, VeRA):
        return {
            **record,
            "peft_type": "VERA",
            "r": int(first.d.shape[0]),
            "vera_dropout": rate,
            "save_projection": True,  # the matrices are ours, not those of their generator
            "bias": "none",
        }
    assert isinstance(first, LoRA)
    ranks = {modules[p]: int(node.b.shape[0]) for p, node in adapted.items() if isinstance(node, LoRA)}
    alphas = {modules[p]: _alpha(node) for p, node in adapted.items() if isinstance(node, LoRA)}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        **record,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": rate,
        "use_dora": isinstance(first, DoRA),
        "use_rslora": False,  # s is what counts: alpha = s r says the same
        "bias": "none",
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): x for m, x in alphas.items() if x != alpha},
    }


def _rate(adapted: Mapping[str, Adapter]) -> float:
    """The dropout of all; that of an embedding's adapter is none.

    Raises:
      PeftError: they differ, for which PEFT has no field.
    """
    rates = {path: getattr(node, "rate", 0.0) for path, node in adapted.items() if not path.endswith("/embedding")}
    if len(set(rates.values())) > 1:
        low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
        raise PeftError(
            f"export: PEFT has one dropout for an adapter; {low} has {rates[low]}, and {high} has {rates[high]}"
        )
    return next(iter(rates.values()), 0.0)


def _alpha(node: LoRA) -> float:
    """alpha with ``alpha / r = s``, in few digits where those give the very same s."""
    rank, scale = int(node.b.shape[0]), np.float32(node.scale)
    short = round(float(scale) * rank, 5)
    return short if np.float32(short / rank) == scale else float(scale) * rank


def adapter_of(
    path: str, weight: Any, given: Mapping[str, np.ndarray], raw: Mapping[str, Any], module: str, name: str
) -> Adapter:
    """Our adapter around a weight, of their tensors by the last part of their names.

    Raises:
      PeftError: a tensor is missing or none of the method's, or their shapes are another weight's.
    """
    if odd := sorted(given.keys() - _parts_of(given, raw)):
        kind = raw["peft_type"]
        kind += " adapter without use_dora" if odd[0] == "lora_magnitude_vector" and kind == "LORA" else " adapter"
        raise PeftError(
            f"{path}: the folder has {', '.join(given)} for it, and a {kind} does not read {odd[0]}: correct the "
            "configuration, or take the tensor out"
        )
    try:
        return _adapter(path, weight, given, raw, module, name)
    except KeyError as error:
        raise PeftError(f"{path}: the folder has {', '.join(given)} of its adapter, but no {error.args[0]}") from None


def _parts_of(given: Mapping[str, np.ndarray], raw: Mapping[str, Any]) -> set[str]:
    """The parts that the method reads."""
    if raw["peft_type"] != "LORA":
        return {"IA3": {"ia3_l"}, "VERA": {"vera_lambda_d", "vera_lambda_b"}}.get(raw["peft_type"], set())
    stem = "lora_embedding_" if any(part.startswith("lora_embedding_") for part in given) else "lora_"
    return {f"{stem}A", f"{stem}B", *(["lora_magnitude_vector"] if raw.get("use_dora") else [])}


def _adapter(
    path: str, weight: Any, given: Mapping[str, np.ndarray], raw: Mapping[str, Any], module: str, name: str
) -> Adapter:
    rank_of_base, kind = len(weight.shape), raw["peft_type"]
    if kind == "VERA":
        d, b = (jnp.asarray(given[f"vera_lambda_{part}"], jnp.float32) for part in "db")
        if rank_of_base != 2 or b.shape != tuple(weight.shape[-1:]):
            raise PeftError(f"{path}: VeRA has {b.shape[0]} gains for a weight of shape {tuple(weight.shape)}")
        return VeRA(weight, d, b, float(raw.get("vera_dropout") or 0.0), name)
    if kind == "IA3":
        gain = jnp.asarray(given["ia3_l"].reshape(-1), jnp.float32)
        forward = is_feedforward(raw.get("feedforward_modules"), module)
        on = "input" if forward else "output"
        if gain.shape[0] != weight.shape[-2 if forward else -1]:
            raise PeftError(f"{path}: (IA)3 has {gain.shape[0]} gains for a weight of shape {tuple(weight.shape)}")
        return IA3(weight, gain, on, name, rank_of_base)
    embedded = "lora_embedding_A" in given
    if embedded and raw.get("use_dora"):
        raise PeftError(f"{path}: DoRA is not defined on embeddings here: merge the adapter in PEFT, or train LoRA")
    pair: list[Any] = [given[f"lora_embedding_{x}" if embedded else f"lora_{x}"] for x in "AB"]
    a, b = pair
    a = a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
    b = b.reshape(b.shape[:2]).T
    rank = int(b.shape[0])
    if rank < 1:
        raise PeftError(f"{path}: its tensors are of rank {rank}, expected 1 or more")
    if (*a.shape[:-1], b.shape[1]) != tuple(weight.shape) or a.shape[-1] != rank:
        raise PeftError(
            f"{path}: an adapter of shapes {a.shape} and {b.shape} is for another base; this weight is "
            f"{tuple(weight.shape)}"
        )
    if rank != (said := of_pattern(raw.get("rank_pattern"), module, raw.get("r", 8))):
        raise PeftError(f"{path}: its tensors are of rank {rank}, the configuration says {said}")
    alpha = of_pattern(raw.get("alpha_pattern"), module, raw.get("lora_alpha", 8))
    scale = jnp.asarray(alpha / (rank**0.5 if raw.get("use_rslora") else rank), jnp.float32)
    ab = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    rate = 0.0 if embedded else float(raw.get("lora_dropout") or 0.0)
    if not raw.get("use_dora"):
        return LoRA(weight, *ab, scale, rate, name, rank_of_base)
    magnitude = jnp.asarray(given["lora_magnitude_vector"].reshape(-1), jnp.float32)
    if magnitude.shape != tuple(weight.shape[-1:]):
        raise PeftError(
            f"{path}: lora_magnitude_vector has {magnitude.shape[0]} magnitudes for a weight of shape "
            f"{tuple(weight.shape)}, expected one an output"
        )
    return DoRA(weight, *ab, scale, rate, name, rank_of_base, magnitude)


def matrices_of(adapted: Mapping[str, Any], tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any]) -> Params:
    """The matrices of their VeRA by our paths: stored, or drawn again by the seed, as torch would.

    Raises:
      PeftError: they are to be stored and are not, or do not fit the adapters.
    """
    nodes: Mapping[str, VeRA] = {path: node for path, node in adapted.items() if isinstance(node, VeRA)}
    if not nodes:
        return {}
    if len(stored := [tensors[key] for key in VERA if key in tensors]) == 2:
        a, b = stored
    elif raw.get("save_projection", True):
        raise PeftError(f"save_projection=True, but the folder has no {' and '.join(VERA)}")
    else:
        rank, (inputs, outputs) = raw["r"], (max(node.shape[axis] for node in nodes.values()) for axis in (-2, -1))
        flat = _torch_uniform(raw.get("projection_prng_key", 0), rank * (inputs + outputs))
        a = _kaiming(flat[: rank * inputs].reshape(rank, inputs))
        b = _kaiming(flat[rank * inputs :].reshape(outputs, rank))
    shared = {"a": jnp.asarray(a.T), "b": jnp.asarray(b.T)}
    try:
        for node in nodes.values():
            dataclasses.replace(node, shared=shared).matrices()
    except TypeError as error:
        raise PeftError(str(error)) from None
    return {f"{SHARED}/{next(iter(nodes.values())).shares}/{part}": array for part, array in shared.items()}


def _torch_uniform(seed: int, count: int) -> np.ndarray:
    """The float32 numbers in [0, 1) of ``torch.Generator().manual_seed(seed)`` on a CPU."""
    words = np.random.RandomState(seed)._bit_generator.random_raw(count)  # type: ignore[attr-defined]
    return (words % 2**24).astype(np.float32) * np.float32(2**-24)


def _kaiming(uniform: np.ndarray) -> np.ndarray:
    """(n, inputs) from U(-sqrt(6 / inputs), sqrt(6 / inputs)), rounded once, as torch does."""
    bound = np.float32((6 / uniform.shape[1]) ** 0.5)
    return (uniform.astype(np.float64) * np.float64(bound + bound) - np.float64(bound)).astype(np.float32)
