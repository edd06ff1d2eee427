"""A frozen layer costs its forward pass only, at every depth of every family that has a golden file.

FLOPs of the step's unrolled program (XLA counts a scanned body once) against those of its parts, each compiled alone:
forward of what is frozen, forward and backward of the rest, whose inputs need no gradient. `test_step`, `test_vit` and
`test_resnet` hold bert, vit and resnet to the matrix products that the shapes ask for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import groups
from jaxtransfer.models import families, run_span
from jaxtransfer.models.api import abstract_init
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.step import make_step, training_stages
from jaxtransfer.tree import combine, flatten, partition
from jaxtransfer.types import Head, State, View
from tests import tiny, torch_reference
from tests.models.test_families import CONFIGS

KINDS = ("sequence-classification", "image-classification")
ROWS = 32  # as many as make the optimizer's part, which does not grow with them, small
MADE = {raw["model_type"]: raw for raw in CONFIGS.values()}
MADE["cifar-resnet"] = {"model_type": "cifar-resnet", "depth": 14, "hidden_sizes": [8, 16]}


@functools.cache
def model_of(name):
    """The family's golden model under a classifier, and an abstract batch of many rows."""
    raw, kind = MADE[name], families()[name]
    still = {field: 0.0 for field, value in raw.items() if "drop" in field and isinstance(value, float)}
    head = next(head for head in KINDS if head in kind.architectures.values())
    model = kind.build(raw | still, Head(head, ("no", "maybe", "yes")))
    inputs = torch_reference.batch_for(raw, 0) | {"labels": np.zeros(3, np.int32), "weight": np.ones(3, np.float32)}
    return model, {field: jax.ShapeDtypeStruct((ROWS, *x.shape[1:]), x.dtype) for field, x in inputs.items()}


def layers(model):
    return [stage.name for stage in model.stages if stage.name.rpartition("/")[2].isdigit()]


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


def ratio(name, depth):
    """FLOPs of the step over those of its parts, with the last ``depth`` layers and all behind them trained."""
    model, batch = model_of(name)
    shapes = abstract_init(model)
    by_path = flatten(labels := groups.labels_of(model, groups.last(model, depth), shapes))
    frozen, rest = partition(shapes, lambda path: by_path[path] == "frozen")
    stats, trained = partition(rest, lambda path: by_path[path] == "stats")
    tx, scalar, objective = tiny.transform(labels), jax.ShapeDtypeStruct((), jnp.int32), cross_entropy()
    state = State(scalar, trained, stats, jax.eval_shape(tx.init, trained), jax.random.key(0), {})
    whole = flops(make_step(model, objective, tx).lower(state, frozen, batch))

    key, names = jax.random.key(0), [stage.name for stage in model.stages]
    cut = names[names.index(layers(model)[-depth]) - 1] if depth else layers(model)[-1]

    def below(params, batch):
        return run_span(model, params, batch, None, cut)

    def above(trained, stats, carry):
        params = combine(combine(trained, stats), frozen_above)
        train = training_stages(model, trained, frozen)
        carry = run_span(model, params, carry, cut, None, train=train, key=key)
        return objective(View(params, carry, carry, None, jnp.zeros((), jnp.int32)))[0], carry.get("stats")

    frozen_above = jax.tree.map(lambda _: None, frozen)
    grad = jax.jit(jax.value_and_grad(above, has_aux=True))
    carry = jax.eval_shape(below, shapes, batch)
    return whole / (flops(jax.jit(below).lower(shapes, batch)) + flops(grad.lower(trained, stats, carry)))


SLOW = [(name, depth) for name in MADE for depth in range(len(layers(model_of(name)[0])) + 1)]
FAST = [("llama", 1)]


@pytest.mark.parametrize(
    ("name", "depth"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)]
)
def test_the_step_costs_what_its_parts_cost(name, depth):
    assert 0.98 <= ratio(name, depth) < 1.05
