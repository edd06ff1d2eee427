"""Cached greedy generation against transformers on torch: tokens a second, interleaved, the same weights.

Random models of GPT-2's and of a small Llama's shape (124 and 134 million parameters), prompts of 32 tokens, 128 new
ones, the prefill included. Both sides must give the same tokens.

Usage: python benchmarks/generate.py [--rounds 5] [--models llama gpt2] [--batch 1 8] [--dtypes float32 bfloat16]

Goal: at least 2 x the tokens a second of transformers in float32.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from step import interleaved

from jaxtransfer import Head, generate, init
from jaxtransfer.models import family
from jaxtransfer.models.names import turn
from jaxtransfer.tree import flatten

PROMPT, NEW = 32, 128
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2048, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
MODELS = {"llama": LLAMA, "gpt2": GPT2}


def pair(raw):
    """Our model with fresh parameters, and theirs with the same."""
    model = family(raw["model_type"]).build(raw, Head("causal-lm"))
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw)).eval()
    leaves = flatten(params)
    names = family(raw["model_type"]).names(model).export_names(leaves, with_prefix=True)
    tensors = {
        name: torch.tensor(np.ascontiguousarray(turn(np.asarray(leaves[path]), how, back=True)))
        for path, (name, how) in names.items()
    }
    if missing := [
        name for name in theirs.load_state_dict(tensors, strict=False).missing_keys if name != "lm_head.weight"
    ]:
        raise SystemExit(f"no weights for {', '.join(missing)}")
    theirs.tie_weights()
    return model, params, theirs


def runners(model, params, theirs, rows, dtype):
    """Functions that generate the (rows, NEW) tokens, ours and theirs."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, PROMPT))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    theirs, given = theirs.to(getattr(torch, jnp.dtype(dtype).name)), torch.tensor(ids)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def ours():
        return np.asarray(generate(model, params, ids, max_new_tokens=NEW, dtype=dtype))

    def torchs():
        with torch.inference_mode():
            return theirs.generate(given, attention_mask=torch.ones_like(given), **options)[:, PROMPT:].numpy()

    return {"ours": ours, "transformers": torchs}


def main():
    """Prints a row for each model, dtype and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    args = parser.parse_args()
    print(
        f"prompt {PROMPT}, {NEW} new tokens, greedy, {jax.devices()[0].device_kind}, {torch.get_num_threads()} torch "
        f"threads, {args.rounds} rounds; medians, ratios pair by pair"
    )
    print(
        f"{'model':8}{'dtype':10}{'batch':>6}{'ours tok/s':>12}{'torch tok/s':>13}{'ours/torch':>12}{'same tokens':>13}"
    )
    for name in args.models:
        model, params, theirs = pair(MODELS[name])
        for dtype in args.dtypes:
            for rows in args.batch:
                both = runners(model, params, theirs, rows, jnp.dtype(dtype))
                same = np.mean(both["ours"]() == both["transformers"]())
                times = interleaved(both, args.rounds)
                speed = {side: rows * NEW / statistics.median(seconds) for side, seconds in times.items()}
                ratio = statistics.median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
                print(
                    f"{name:8}{dtype:10}{rows:6}{speed['ours']:12.1f}{speed['transformers']:13.1f}{ratio:12.2f}{same:13.1%}",
                    flush=True,
                )
                if dtype == "float32" and same < 1:
                    raise SystemExit(f"{name}, batch {rows}: the tokens differ")


if __name__ == "__main__":
    main()
