"""How a model lies on a mesh: its family's own rules and the generic one, checked against its heads and its layers."""

import re
from typing import Any

from jaxtransfer.models.registry import family
from jaxtransfer.parallel.mesh import SEQUENCE, ShardingError, parts
from jaxtransfer.parallel.specs import fsdp, shardings
from jaxtransfer.tree.paths import Params, flatten, weight_path
from jaxtransfer.tree.rules import Rules
from jaxtransfer.types import Model

_PROJECTION = re.compile(r".*/attention/(query|key|value|qkv)/kernel")


def sharding_rules(mesh: Any, model: Model, params: Params) -> Rules:
    """How parameters, concrete or abstract, are placed: the family's rules for ``tensor``, the generic for ``fsdp``.

    Args:
      mesh: of `make_mesh`, or abstract.
      model: of the zoo; of a user's own model ``fsdp`` alone splits parameters.
      params: canonical, with whatever is attached.

    Raises:
      ShardingError: heads, or a dimension, that do not divide by the axis, with the leaf named; ``tensor`` for a model
        without rules for it, ``sequence`` for one without attention.
    """
    tensor = parts(mesh, "tensor")
    own = family(model.family).tensor_rules if tensor > 1 and model.family != "foreign" else ()
    if tensor > 1 and not own:
        raise ShardingError(
            f"mesh: tensor = {tensor}, but there are no rules by which a {model.family} model's layers are split; use "
            "data and fsdp"
        )
    check_sequence(mesh, model, params)
    if tensor > 1:
        _check_heads(model, params, tensor)
    rules = (*own, *fsdp(params, mesh))
    shardings(params, mesh, rules)
    return rules


def has_attention(params: Params) -> bool:
    """Whether some layer attends, by the names of this library's own."""
    return any("/attention/" in path for path in flatten(params))


def check_sequence(mesh: Any, model: Model, params: Params) -> None:
    """Raises :class:`ShardingError` where tokens would be split of a model that has no attention to gather them."""
    if (cut := parts(mesh, SEQUENCE)) > 1 and not has_attention(params):
        raise ShardingError(
            f"mesh: sequence = {cut}, but a {model.family} model has no attention, whose keys and values that axis "
            "gathers; use data and fsdp"
        )


def _check_heads(model: Model, params: Params, tensor: int) -> None:
    heads = model.config.num_attention_heads
    shared = getattr(model.config, "kv_heads", heads)
    for path in map(weight_path, flatten(params)):
        if found := _PROJECTION.fullmatch(path):
            own, what = (shared, "heads of keys and values") if found[1] in ("key", "value") else (heads, "heads")
            if own % tensor:
                raise ShardingError(
                    f"{path}: {own} {what} do not divide by tensor = {tensor}; take a mesh with a smaller tensor axis"
                )
