"""What holds of every family: a golden file, strict reading, names that lead there and back. A new one adds no line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtransfer.models import ConfigFieldError, apply, families, layout_of, registry
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.names import turn
from jaxtransfer.tree import flatten, stack
from tests.models import zoo

CONFIGS = {
    str(path.parent.relative_to(zoo.GOLDENS)): json.loads(path.read_text())
    for path in sorted(zoo.GOLDENS.rglob("config.json"))
    if (path.parent / "model.safetensors").exists()
}
OWN = [name for name in CONFIGS if name.startswith("families/")]
"""The others have tests of their own."""


def test_every_file_of_families_has_a_golden_file():
    stored = {raw["model_type"] for raw in CONFIGS.values()}
    files = [found for found in registry._declarations() if any(kind.hub for kind in found.values())]
    assert not [sorted(found) for found in files if not stored & found.keys()]


@pytest.mark.parametrize("name", OWN)
def test_outputs_are_those_of_torch(name):
    folder = zoo.GOLDENS / name
    model, params = zoo.from_folder(folder)
    batch, want = (dict(np.load(folder / f"{file}.npz")) for file in ("inputs", "outputs"))
    run = jax.jit(lambda params: apply(model, params, batch))
    for found in (run(params), run(stack(params, layout_of(model, params)))):
        shown = [model.outputs[entry] for entry in model.stages[-1].writes if entry in model.outputs]
        assert shown
        for output in shown:  # not of the trunk: that of a convolutional one has torch's channels first
            zoo.assert_close(found[output], want[output])


@pytest.mark.parametrize("name", CONFIGS)
def test_names_lead_there_and_back(name):
    model, params = zoo.from_folder(zoo.GOLDENS / name)
    tensors, leaves = load_file(zoo.GOLDENS / name / "model.safetensors"), flatten(params)
    table = families()[model.family].names(model)
    names = table.export_names(leaves, with_prefix=model.head is not None)
    assert len({theirs for theirs, _ in names.values()}) == len(leaves)
    for path, (theirs, how) in names.items():
        assert np.array_equal(turn(leaves[path], how, back=True), tensors[theirs]), path
    assert not [drop.regex for drop in table.drops if ".*" in drop.regex], "a drop that would swallow what it never saw"
    rest = set(tensors) - {theirs for theirs, _ in names.values()}
    assert rest == set(table.load_plan(tensors, list(flatten(abstract_init(model)))).dropped)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_is_read_strictly_or_not_at_all(name):
    raw, odd = CONFIGS[name], {"no": "such value"}
    kind, head = families()[raw["model_type"]], zoo.stored_head(raw)
    plain = kind.build(raw, head)
    assert dataclasses.is_dataclass(plain.config)
    for field in (*sorted(raw.keys() - {"model_type", "architectures", "id2label", "label2id"}), "some_new_thing"):
        try:
            found = kind.build({**raw, field: odd}, head).config
        except ConfigFieldError as error:
            assert field in str(error)
        else:
            assert field != "some_new_thing" and found == plain.config, f"{field}={odd} changes the configuration"
    assert kind.build(kind.export_config(plain, raw), head).config == plain.config
