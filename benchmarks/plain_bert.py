"""A BERT classifier's training step in plain JAX, by hand: the library's step is measured against it.

No module system, no rules, no labels: two dictionaries (trained and frozen) of arrays stacked over layers, the frozen
part not differentiated, the update by optax. The mathematics is the library's: the same post-norm blocks, dropout,
cross-entropy, clipping and AdamW. Adapters' linears are `plain_adapters`'.
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


def bottleneck(y, p, place):
    """An adapter at a place of a layer, where it has one."""
    if "adapter" not in p:
        return y
    low = p["adapter"][place]["gelu"]
    return y + dense(jax.nn.gelu(dense(y, low["down"]), approximate=False), low["up"])


def behind(prefix, x):
    """What every row begins with, (P, d), before (B, T, d)."""
    return jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)


def block(x, p, mask, key, heads, dense=dense):
    """One encoder layer; its linears by ``dense``, bottlenecks and a prefix where there are such parameters."""
    keys = [None] * 3 if key is None else jax.random.split(key, 3)
    a, m = p["attention"], p["mlp"]
    batch, length, width = x.shape
    q, k, v = (dense(x, a[name]) for name in ("query", "key", "value"))
    if "prefix" in p:
        k, v = behind(p["prefix"]["key"], k), behind(p["prefix"]["value"], v)
        mask = jnp.pad(mask, ((0, 0), (k.shape[1] - length, 0)), constant_values=True)
    q, k, v = (y.reshape(batch, -1, heads, width // heads) for y in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q * (width // heads) ** -0.5, k)
    probs = dropout(jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)), keys[0])
    y = jnp.einsum("bhts,bshd->bthd", probs, v).reshape(x.shape)
    x = norm(x + bottleneck(dropout(dense(y, a["output"]), keys[1]), p, "attention"), a["norm"])
    y = dense(jax.nn.gelu(dense(x, m["up"]), approximate=False), m["down"])
    return norm(x + bottleneck(dropout(y, keys[2]), p, "mlp"), m["norm"])


def stack_of(x, p, mask, key, heads, remat, dense=dense):
    """A run of layers, scanned; in evaluation mode without a key."""
    count = len(p["attention"]["query"]["bias"])
    body = partial(block, mask=mask, heads=heads, dense=dense)

    def layer(x, item):
        params, index = item
        return body(x, params, key=None if key is None else jax.random.fold_in(key, index)), None

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(layer, x, (p, jnp.arange(count)))[0]


def merged(frozen, trained):
    """Two trees of dictionaries as one."""
    if not isinstance(frozen, dict):
        return frozen
    both = {name: merged(frozen[name], trained[name]) for name in frozen if name in trained}
    return {**frozen, **trained, **both}


def logits_of(trained, frozen, batch, key, heads, remat, linear=None):
    """The classifier; a part runs in training mode where something of it is in ``trained``, and there is a key."""
    part, linear = merged(frozen, trained), dense if linear is None else linear(frozen)
    names = ("embed", "low", "high", "head")
    keys = dict.fromkeys(names) if key is None else dict(zip(names, jax.random.split(key, 4), strict=True))
    own = {name: keys[name] if name in trained else None for name in keys}
    ids, mask = batch["input_ids"], batch["attention_mask"].astype(bool)
    e = part["embed"]
    x = e["word"]["embedding"][ids]
    if "prompt" in e:
        x = behind(e["prompt"]["embedding"], x)
        mask = jnp.pad(mask, ((0, 0), (x.shape[1] - mask.shape[1], 0)), constant_values=True)
    x = x + e["position"]["embedding"][: x.shape[1]] + e["type"]["embedding"][0]
    x = dropout(norm(x, e["norm"]), own["embed"])
    for name in ("low", "high"):
        if name in part:
            x = stack_of(x, part[name], mask, own[name], heads, remat, linear)
    pooled = jnp.tanh(dense(x[:, 0], part["pooler"]["dense"]))
    return dense(dropout(pooled, own["head"]), part["head"]["out"])


def loss_of(trained, frozen, batch, key, heads, remat, linear=None):
    """Mean cross-entropy."""
    logp = jax.nn.log_softmax(logits_of(trained, frozen, batch, key, heads, remat, linear))
    return -jnp.take_along_axis(logp, batch["labels"][:, None], 1).mean()


def make_step(tx, heads, *, remat=False, linear=None):
    """``step(trained, opt_state, key, frozen, batch)``, donated and jitted.

    ``linear(frozen)`` gives the blocks' ``dense(x, p)`` where they are not plain ones.
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, opt_state, key, frozen, batch):
        loss, grads = jax.value_and_grad(loss_of)(trained, frozen, batch, key, heads, remat, linear)
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
