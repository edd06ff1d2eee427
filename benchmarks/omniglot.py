"""Prototypical networks on the characters of an alphabet that was never seen, against their pixels.

Of the five alphabets in ``images/omniglot`` four are trained on and the fifth is tested on, each in turn. Images are
28 x 28; in training a character turned by 90, 180 or 270 degrees is a class of its own. Every number is over the same
episodes of 5 characters with 1 or 5 examples each, 15 queries a character: the nearest class mean, of what `conv4`
makes of the images, or of the pixels. Nothing is chosen by the alphabet that is tested on: the last state is measured.

Usage: python benchmarks/omniglot.py [--steps 400] [--ways 20] [--episodes 600] [--only Korean ...] [--results FILE]

Needs the data sets (``JAXTRANSFER_DATA``, by default ../shared/data).
"""

import argparse
import io
import json
import os
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import jaxtransfer as jt
from jaxtransfer import fewshot, probes
from jaxtransfer.data.loader import Examples
from jaxtransfer.models.conv4 import conv4

DATA = Path(os.environ.get("JAXTRANSFER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ZIP = DATA / "images" / "omniglot" / "images_background_small1.zip"
WAYS, SHOTS, QUERIES, SIDE = 5, (1, 5), 15, 28


def read():
    """Alphabet -> characters (C, 20, 28, 28, 1), ink 1 on paper 0."""
    found = {}
    with zipfile.ZipFile(ZIP) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png") and "MACOSX" not in name:
                _, alphabet, character, _ = name.split("/")
                image = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((SIDE, SIDE), Image.BILINEAR)
                pixels = 1.0 - np.asarray(image, np.float32) / 255.0
                found.setdefault(alphabet, {}).setdefault(character, []).append(pixels[..., None])
    return {alphabet: np.stack([np.stack(x) for x in found[alphabet].values()]) for alphabet in found}


def flat(characters):
    """Images (N, 28, 28, 1) and the characters that they show, (N,)."""
    count, each = characters.shape[:2]
    return characters.reshape(-1, SIDE, SIDE, 1), np.repeat(np.arange(count), each)


def trained(characters, steps, ways, shots, queries, seed):
    """`conv4` after so many episodes of the characters and their rotations, and the accuracies on the way."""
    turned = np.concatenate([np.rot90(characters, k, axes=(2, 3)) for k in range(4)])
    images, labels = flat(np.ascontiguousarray(turned))
    source = conv4(jax.random.key(seed))
    kinds = jt.groups.labels_of(source.model, jt.groups.full(source.model), source.params)
    group = jt.Group(lr=2e-3, weight_decay=0.0, schedule="cosine", steps=steps)
    tx = jt.optimizer(kinds, {"trunk": group})
    state, frozen = jt.init_state(source.model, source.params, kinds, tx, jax.random.key(seed))
    step = jt.make_step(source.model, fewshot.prototypical(ways), tx)
    drawn = fewshot.episodes(labels, ways, shots, queries, seed)
    data = fewshot.episode_batches(Examples(fixed={"inputs": images}), drawn)
    seen = []
    state = jt.fit(step, state, frozen, data, steps=steps, log_every=50, callbacks=[lambda e: seen.append(e)])
    embed = jax.jit(lambda params, x: jt.apply(source.model, params, {"inputs": x})["last_hidden_state"])
    return lambda x: np.concatenate([embed(jt.params_of(state, frozen), part) for part in np.array_split(x, 8)]), seen


def accuracies(features, labels, shots, count, seed=1):
    """Of every episode the share of its queries whose nearest class mean is their own."""
    drawn = fewshot.episodes(labels, WAYS, shots, QUERIES, seed)
    wanted = np.repeat(np.arange(WAYS), QUERIES)

    @jax.jit
    def right(support, queries):
        centres = probes.prototypes(support, np.repeat(np.arange(WAYS), shots), WAYS)
        return (probes.classify_by_prototypes(queries, centres).argmax(axis=1) == wanted).mean()

    tasks = [drawn[i] for i in range(count)]
    return np.array([right(features[t.support.ravel()], features[t.queries.ravel()]) for t in tasks])


def held_out(alphabets, name, args):
    """Per cent right on an alphabet by (what is compared, shots), with the half of a 95 % interval over episodes."""
    began = time.time()
    others = np.concatenate([alphabets[other] for other in alphabets if other != name])
    embed, seen = trained(others, args.steps, args.ways, args.shots, args.queries, args.seed)
    seconds = time.time() - began
    images, labels = flat(alphabets[name])
    out = {"characters": len(alphabets[name]), "seconds": seconds}
    for kind, features in (("prototypes", embed(images)), ("pixels", images.reshape(len(images), -1))):
        for shots in SHOTS:
            found = 100 * accuracies(features, labels, shots, args.episodes)
            out[f"{kind} {shots}"] = [float(found.mean()), float(1.96 * found.std(ddof=1) / len(found) ** 0.5)]
    out["training accuracy"] = [float(event["accuracy"]) for event in seen if event["kind"] == "train"]
    return out


def main():
    """Prints a row an alphabet, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ways", type=int, default=20, help="of the training episodes")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=600, help="of the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--results", type=Path, help="JSON; what is in it is not run again")
    args = parser.parse_args()
    alphabets = read()
    done = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    columns = [f"{kind} {shots}" for kind in ("prototypes", "pixels") for shots in SHOTS]
    print(f"{'tested on':16}{'characters':>12}" + "".join(f"{c + '-shot':>20}" for c in columns) + f"{'seconds':>10}")
    for name in args.only or alphabets:
        if name not in done:
            done[name] = held_out(alphabets, name, args)
            if args.results:
                args.results.write_text(json.dumps(done, indent=1))
        row = done[name]
        cells = "".join(f"{f'{row[c][0]:.1f} +- {row[c][1]:.1f}':>20}" for c in columns)
        print(f"{name:16}{row['characters']:>12}{cells}{row['seconds']:>10.0f}", flush=True)
    mean = "".join(f"{np.mean([done[name][c][0] for name in args.only or alphabets]):>20.1f}" for c in columns)
    print(f"{'mean':28}{mean}")


if __name__ == "__main__":
    main()
