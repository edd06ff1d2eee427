"""Linear probing before fine-tuning, on many draws of the two-layer linear problem of Kumar et al. 2022.

``f(x) = v . B x``, d = 20, k = 5; ten examples in a subspace of five dimensions; the pre-trained B is near the true
one. The error out of distribution is ``|B^T v - B*^T v*|^2``, that of a standard normal x. One draw says little: every
draw is trained in three ways, all of them at once by `jax.vmap` over the library's own step.

Usage: python benchmarks/lp_ft.py [--draws 1000] [--steps 5000] [--near 0.02]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxtransfer as jt
from jaxtransfer.models.foreign import from_nnx
from jaxtransfer.phases import next_phase
from jaxtransfer.step import params_of

WIDTH, FEATURES, EXAMPLES, SPAN = 20, 5, 10, 5
REFERENCE = {"fine-tuning": 14.04, "linear probing": 1.205, "LP-FT": 1.198}


def orthonormal(matrices):
    return np.linalg.qr(matrices)[0]


def problems(draws, near):
    """``(parameters, batch, what B^T v should be)``, each with the draws in front."""
    rng = np.random.default_rng(0)
    true = orthonormal(rng.normal(size=(draws, WIDTH, FEATURES)))
    known = orthonormal(true + near * rng.normal(size=true.shape))
    wanted = true @ rng.normal(size=(draws, FEATURES, 1))
    x = np.zeros((draws, EXAMPLES, WIDTH))
    x[..., :SPAN] = rng.normal(size=(draws, EXAMPLES, SPAN))
    params = {"body": {"kernel": known}, "head": {"kernel": rng.normal(size=(draws, FEATURES, 1))}}
    batch = {"inputs": x, "labels": (x @ wanted)[..., 0], "weight": np.ones((draws, EXAMPLES))}
    return *jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, batch)), wanted


def squared(view):
    error = view.outputs["logits"][:, 0] - view.batch["labels"]
    return jnp.mean(error**2), {"weight": jnp.sum(view.batch["weight"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=5000, help="of each phase")
    parser.add_argument("--near", type=float, default=0.02, help="how far the pre-trained features are off")
    arguments = parser.parse_args()
    params, batch, wanted = problems(arguments.draws, arguments.near)
    model = from_nnx(
        {
            "body": nnx.Linear(WIDTH, FEATURES, use_bias=False, rngs=nnx.Rngs(0)),
            "head": nnx.Linear(FEATURES, 1, use_bias=False, rngs=nnx.Rngs(0)),
        },
        input="inputs",
    ).model
    kinds = {}
    for name, rules in (("full", jt.groups.full), ("head", jt.groups.head_only)):
        labels = jt.groups.labels_of(model, rules(model), params)
        group = jt.Group("sgd", lr=0.02, weight_decay=0.0, momentum=0.9)
        tx = jt.optimizer(labels, dict.fromkeys(set(jax.tree.leaves(labels)) - {jt.groups.FROZEN}, group))
        kinds[name] = labels, tx, jax.vmap(jt.make_step(model, squared, tx, donate=False))

    def trained(name, state, frozen):
        def turn(_, carried):
            return kinds[name][2](carried, frozen, batch)[0]

        return jax.jit(lambda state: jax.lax.fori_loop(0, arguments.steps, turn, state))(state)

    def begun(name):
        labels, tx, _ = kinds[name]
        return jax.vmap(lambda params: jt.init_state(model, params, labels, tx, jax.random.key(0)))(params)

    def error(state, frozen):
        found = params_of(state, frozen)
        return np.sum((np.asarray(found["body"]["kernel"] @ found["head"]["kernel"]) - wanted) ** 2, axis=(1, 2))

    labels, tx, _ = kinds["full"]
    start, nothing = begun("full")
    state, frozen = begun("head")
    probed = trained("head", state, frozen)
    both, rest = jax.vmap(lambda state, frozen: next_phase(model, state, frozen, labels, tx))(probed, frozen)
    errors = {
        "fine-tuning": error(trained("full", start, nothing), nothing),
        "linear probing": error(probed, frozen),
        "LP-FT": error(trained("full", both, rest), rest),
    }
    print(f"error out of distribution, {arguments.draws} draws: median [5 %, 95 %], and draws below the reference")
    for name, found in errors.items():
        low, middle, high = np.quantile(found, (0.05, 0.5, 0.95))
        below = 100 * np.mean(found < REFERENCE[name])
        print(f"{name:14s} {middle:6.3f} [{low:.3f}, {high:.3f}]  {below:.1f} % below {REFERENCE[name]}")
    ratio = errors["fine-tuning"] / errors["LP-FT"]
    worse, factor = 100 * np.mean(ratio > 1), np.median(ratio)
    print(f"fine-tuning is worse than LP-FT in {worse:.1f} %, by a median factor of {factor:.1f}")


if __name__ == "__main__":
    main()
