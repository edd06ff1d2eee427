"""Make the golden files of all families: `python tests/goldens/make_goldens.py [FOLDER | --family NAME]`.

Needs torch and transformers (the versions used are in README.md). Every parameter and input comes from a
seed, so the same versions on the same machine give the same bytes.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests import torch_reference as reference  # noqa: E402 (the repository is on the path only now)
from tests.models import decoder_zoo  # noqa: E402

# These folders hold weights, inputs and outputs; the other combinations hold config.json and keys.json only.
COMPLETE = {("bert", "seqcls"), ("roberta", "mlm"), ("distilbert", "qa"), ("xlm-roberta", "tokencls")}
DECODERS = ("gpt2", "llama", "gemma3_text")
IMAGES = {"vit": ("imgcls", (20, 20)), "deit": ("teacher", (20, 20)), "dinov2": ("imgcls", (15, 25))}
SEED = 20
SHAPE = (3, 11)


def read_keys(path):
    """The sorted (name, shape, dtype) of every tensor in a safetensors file, read from its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return [(name, header[name]["shape"], header[name]["dtype"]) for name in sorted(header)]


def write_keys(path, keys):
    lines = ",\n".join(f"  {json.dumps([name, shape, dtype])}" for name, shape, dtype in keys)
    path.write_text(f"[\n{lines}\n]\n")


def write_complete(folder, saved, model, family):
    """The weights as saved, a batch, and everything that the model makes of it."""
    shutil.copyfile(saved / "model.safetensors", folder / "model.safetensors")
    inputs = reference.batch(family, model.config.vocab_size, SHAPE, SEED)
    write_outputs(folder, inputs, reference.outputs(model, inputs))


def write_outputs(folder, inputs, arrays):
    """Inputs and outputs by name; the hidden states one by one."""
    for index, state in enumerate(arrays.pop("hidden_states")):
        arrays[f"hidden_states/{index}"] = state
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "outputs.npz", **arrays)


def make(family, head, target):
    folder = target / f"{family}-{head}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = reference.random_model(family, head, SEED)
    with tempfile.TemporaryDirectory() as temporary:
        saved = reference.save(model, temporary)
        write_keys(folder / "keys.json", read_keys(saved / "model.safetensors"))
        shutil.copyfile(saved / "config.json", folder / "config.json")
        if (family, head) in COMPLETE:
            write_complete(folder, saved, model, family)


def make_decoder(family, target):
    """A decoder under a causal-LM head: its files, a batch, and what the model makes of it."""
    folder = target / "decoders" / family
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = decoder_zoo.random_model(family, "clm", SEED)
    with tempfile.TemporaryDirectory() as temporary:
        saved = reference.save(model, temporary)
        shutil.copyfile(saved / "config.json", folder / "config.json")
        shutil.copyfile(saved / "model.safetensors", folder / "model.safetensors")
    inputs = decoder_zoo.batch(seed=SEED)
    write_outputs(folder, inputs, reference.outputs(model, inputs))


def make_images(family, target):
    """A classifier of images, and what it makes of a batch of the given height and width."""
    folder = target / "images" / family
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    head, size = IMAGES[family]
    model = reference.random_model(family, head, SEED)
    with tempfile.TemporaryDirectory() as temporary:
        saved = reference.save(model, temporary)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(saved / name, folder / name)
    pixels = np.random.default_rng(SEED).standard_normal((3, *size, 3)).astype(np.float32)
    inputs = {"pixel_values": pixels}
    write_outputs(folder, inputs, reference.outputs(model, inputs))


def make_family(config, target):
    """The model of a hand-written `families/NAME/config.json`, and what it makes of a batch."""
    folder = target / "families" / config.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(config.read_text())
    model = reference.from_config(raw, SEED)
    with tempfile.TemporaryDirectory() as temporary:
        saved = reference.save(model, temporary)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(saved / name, folder / name)
    inputs = reference.batch_for(raw, SEED)
    write_outputs(folder, inputs, reference.outputs(model, inputs))


def main(target):
    for family, head in reference.combinations():
        make(family, head, target)
    for family in DECODERS:
        make_decoder(family, target)
    for family in IMAGES:
        make_images(family, target)
    for config in sorted(HERE.glob("families/*/config.json")):
        make_family(config, target)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--family"]:
        make_family(HERE / "families" / sys.argv[2] / "config.json", HERE)
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
