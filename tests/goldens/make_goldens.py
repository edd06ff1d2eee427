"""Make the golden files of the BERT encoder family: `python tests/goldens/make_goldens.py [FOLDER]`.

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

# These folders hold weights, inputs and outputs; the other combinations hold config.json and keys.json only.
COMPLETE = {("bert", "seqcls"), ("roberta", "mlm"), ("distilbert", "qa"), ("xlm-roberta", "tokencls")}
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
    arrays = reference.outputs(model, inputs)
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


def main(target):
    import torch

    torch.set_num_threads(1)
    for family, head in reference.combinations():
        make(family, head, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
