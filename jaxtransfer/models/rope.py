"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with the scalings that published decoders use."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.models.registry import ConfigFieldError

FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
"""The fields of ``config.json`` that :func:`read` reads: transformers 5 writes the first, older files the others."""

_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim",
    ),
}  # fmt: skip
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How far a pair of features turns with the position.

    Attributes:
      theta: the base; pair ``i`` of ``d / 2`` turns by ``theta ** (-2 i / d)`` a position, before scaling.
      kind: ``default`` (unscaled), ``linear``, ``llama3`` or ``yarn``.
      numbers: the scaling's own, by transformers' names.
      truncate: yarn rounds the borders of its ramp.
    """

    theta: float
    kind: str = "default"
    numbers: tuple[tuple[str, float], ...] = ()
    truncate: bool = True


def read(raw: Mapping[str, Any], limit: int) -> Rope:
    """The one rope of a configuration, in the spelling of transformers 5 or an older one.

    Args:
      raw: the content of ``config.json``.
      limit: ``max_position_embeddings``; the length before scaling, where the file does not give that.

    Raises:
      ConfigFieldError: an unknown scaling or key, or a number that is missing or not positive; names the field.
    """
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return parse(raw.get(field) or {}, field, raw.get("rope_theta", 10000.0), limit)


def parse(given: Any, field: str, theta: Any, limit: int) -> Rope:
    """The rope of one dictionary, found at ``field``; ``theta`` where the dictionary has none. Raises as `read`."""
    if not isinstance(given, Mapping):
        raise ConfigFieldError(f"config field {field}: expected a dictionary, found {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _NUMBERS:
        name = "rope_type" if "rope_type" in given else "type"
        raise ConfigFieldError(f"config field {field}.{name}={kind!r} is not supported; supported: {[*_NUMBERS]}")
    known = {"rope_type", "type", "rope_theta", *_NUMBERS[kind], *(["truncate"] if kind == "yarn" else [])}
    if unknown := [name for name in given if name not in known]:
        raise ConfigFieldError(f"config field {field}.{unknown[0]} is unknown for the rope type {kind!r}")
    if given.get("truncate", True) not in (True, False):
        raise ConfigFieldError(f"config field {field}.truncate: expected true or false, found {given['truncate']!r}")
    has = {"original_max_position_embeddings": limit} | {k: v for k, v in given.items() if v is not None}
    if missing := [name for name in _NUMBERS[kind] if name not in has and name not in _OPTIONAL]:
        raise ConfigFieldError(f"config field {field} lacks {missing[0]}, which the rope type {kind!r} needs")
    numbers = tuple((name, _positive(f"{field}.{name}", has[name])) for name in _NUMBERS[kind] if name in has)
    base = f"{field}.rope_theta" if "rope_theta" in has else "rope_theta"
    rope = Rope(_positive(base, has.get("rope_theta", theta)), kind, numbers, given.get("truncate", True))
    if kind == "llama3" and dict(numbers)["high_freq_factor"] <= dict(numbers)["low_freq_factor"]:
        raise ConfigFieldError(f"config field {field}.high_freq_factor must be above low_freq_factor, found {given!r}")
    return rope


def _positive(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigFieldError(f"config field {field}: expected a positive number, found {value!r}")
    return float(value)


def frequencies(rope: Rope, width: int) -> tuple[np.ndarray, float]:
    """Radians a position for each of ``width / 2`` pairs, float32, and what the tables are multiplied by.

    Example:
      >>> frequencies(Rope(100.0), 4)
      (array([1. , 0.1], dtype=float32), 1.0)
    """
    n = dict(rope.numbers)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    # Rounded to float32 twice, as torch does: an angle at position 100,000 shows the last bit of a frequency.
    plain = np.float32(1.0) / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(n["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, n), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, n, rope, width)
    return plain, 1.0


def _llama3(plain: np.ndarray, n: Mapping[str, float]) -> np.ndarray:
    """Llama 3.1: long waves are stretched by the factor, short ones are kept, those between are blended."""
    low, high = n["low_freq_factor"], n["high_freq_factor"]
    waves = n["original_max_position_embeddings"] * plain.astype(np.float64) / (2 * math.pi)
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * plain / n["factor"] + kept * plain).astype(np.float32)


def _yarn(plain: np.ndarray, n: Mapping[str, float], rope: Rope, width: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolated below a number of turns, kept above another."""
    length, factor = n["original_max_position_embeddings"], n["factor"]

    def pair(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(n.get("beta_fast", 32.0)), pair(n.get("beta_slow", 1.0))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    turned = (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    usual = gain(n["mscale"]) / gain(n["mscale_all_dim"]) if {"mscale", "mscale_all_dim"} <= set(n) else gain(1.0)
    return turned, n.get("attention_factor", usual)


def tables(ropes: tuple[Rope, ...], positions: jax.Array, width: int) -> dict[str, jax.Array]:
    """Cosines and sines, (B, T, ropes, width / 2) in float32, of positions (B, T)."""
    found = [frequencies(rope, width) for rope in ropes]
    turns = jnp.asarray(np.stack([turn for turn, _ in found]))
    gains = np.asarray([gain for _, gain in found], np.float32)[None, None, :, None]
    angles = positions.astype(jnp.float32)[:, :, None, None] * turns[None, None]
    return {"cos": jnp.cos(angles) * gains, "sin": jnp.sin(angles) * gains}


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs ``(x_i, x_{i + d/2})`` of each head: (B, T, heads, d) by tables (B, T, 1, d / 2)."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
