"""A BERT classifier's training step in plain JAX, by hand: the library's step is measured against it.

No module system, no rules, no labels: two dictionaries (trained and frozen) of arrays stacked over layers, the frozen
part not differentiated, the update by optax. The mathematics is the library's: the same post-norm blocks, dropout,
cross-entropy, clipping and AdamW.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

RATE = 0.1


def norm(x, p):
    """Layer normalisation."""
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def dense(x, p):
    """x w + b."""
    return x @ p["kernel"] + p["bias"]


def dropout(x, key):
    """Inverted dropout; identity without a key."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0.0)


def block(x, p, mask, key, heads):
    """One encoder layer."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    a, m = p["attention"], p["mlp"]
    batch, length, width = x.shape
    q, k, v = (dense(x, a[name]).reshape(batch, length, heads, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q * (width // heads) ** -0.5, k)
    probs = dropout(jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)), keys[0])
    y = jnp.einsum("bhts,bshd->bthd", probs, v).reshape(x.shape)
    x = norm(x + dropout(dense(y, a["output"]), keys[1]), a["norm"])
    y = dense(jax.nn.gelu(dense(x, m["up"]), approximate=False), m["down"])
    return norm(x + dropout(y, keys[2]), m["norm"])


def stack_of(x, p, mask, key, heads, remat):
    """A run of layers, scanned; in evaluation mode without a key."""
    count = p["attention"]["query"]["kernel"].shape[0]
    body = partial(block, mask=mask, heads=heads)

    def layer(x, item):
        params, index = item
        return body(x, params, key=None if key is None else jax.random.fold_in(key, index)), None

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(layer, x, (p, jnp.arange(count)))[0]


def logits_of(trained, frozen, batch, key, heads, remat):
    """The classifier; a part runs in training mode where it is in ``trained``."""
    part = {**frozen, **trained}
    live = {name: key for name in trained}
    keys = dict(zip(("embed", "low", "high", "head"), jax.random.split(key, 4), strict=True))
    own = {name: keys[name] if name in live else None for name in keys}
    ids, mask = batch["input_ids"], batch["attention_mask"].astype(bool)
    e = part["embed"]
    x = e["word"]["embedding"][ids] + e["position"]["embedding"][: ids.shape[1]] + e["type"]["embedding"][0]
    x = dropout(norm(x, e["norm"]), own["embed"])
    for name in ("low", "high"):
        if name in part:
            x = stack_of(x, part[name], mask, own[name], heads, remat)
    pooled = jnp.tanh(dense(x[:, 0], part["pooler"]["dense"]))
    return dense(dropout(pooled, own["head"]), part["head"]["out"])


def loss_of(trained, frozen, batch, key, heads, remat):
    """Mean cross-entropy."""
    logp = jax.nn.log_softmax(logits_of(trained, frozen, batch, key, heads, remat))
    return -jnp.take_along_axis(logp, batch["labels"][:, None], 1).mean()


def make_step(tx, heads, *, remat=False):
    """``step(trained, opt_state, key, frozen, batch)``, donated and jitted."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, key, frozen, batch):
        loss, grads = jax.value_and_grad(loss_of)(trained, frozen, batch, key, heads, remat)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


def decay_mask(tree):
    """No weight decay on biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), tree)


def adamw(lr=1e-4):
    """Clipping by the global norm, then AdamW."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=0.01, mask=decay_mask))


def split(params, layers, frozen_blocks, trained_parts):
    """The library's canonical parameters as this file keeps them: ``(trained, frozen)``.

    Args:
      params: canonical.
      layers: how many blocks there are.
      frozen_blocks: the first so many are one run ("low"), the rest another ("high").
      trained_parts: names among embed, low, high, pooler, head.
    """

    def run(start, stop):
        return jax.tree.map(lambda *x: jnp.stack(x), *[params["blocks"][str(i)] for i in range(start, stop)])

    parts = {name: jax.tree.map(jnp.copy, params[name]) for name in ("embed", "pooler", "head")}
    if frozen_blocks:
        parts["low"] = run(0, frozen_blocks)
    if frozen_blocks < layers:
        parts["high"] = run(frozen_blocks, layers)
    trained = {name: part for name, part in parts.items() if name in trained_parts}
    return trained, {name: part for name, part in parts.items() if name not in trained_parts}
