"""The arithmetic of a program, counted where shapes are known: in the jaxpr, every pass of a loop."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def flops(fn: Any, *args: Any) -> float:
    """Floating-point operations of the products in ``fn(*args)``, over all devices.

    A product of (m, k) and (k, n) is ``2 m k n``, a convolution twice its kernel's inputs for every output. What is not
    a product is not counted, as is usual. XLA's own ``cost_analysis`` counts the body of a loop once, whatever its
    length; here it counts as often as it runs.

    Args:
      fn: a function of arrays, jitted or not.
      args: arrays or abstract arrays.

    Raises:
      ValueError: a loop without a length, around a product.

    Example:
      >>> import jax.numpy as jnp
      >>> flops(lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.ones((5, 8, 8)))[0], jnp.ones((4, 8)))
      2560.0
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # what is not read is not computed either
    return count(live)


def count(jaxpr: Jaxpr) -> float:
    """Operations of the products in a jaxpr; see :func:`flops`."""
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        each = 2.0 * math.prod(kernel) / outputs / params["batch_group_count"]
        return each * math.prod(equation.outvars[0].aval.shape)
    inside = [count(jaxpr) for jaxpr in inner(params)]
    if name == "cond":
        return max(inside)
    if name == "while" and any(inside):
        raise ValueError("flops: a while loop has no length that could be counted, and holds products")
    return sum(inside) * params.get("length", 1) if name == "scan" else float(sum(inside))


def inner(params: Any) -> Iterator[Jaxpr]:
    """The programs that an equation runs."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
