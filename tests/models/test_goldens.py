"""Parity with torch where torch is absent: outputs that it gave once, in files."""

import numpy as np
import pytest

from tests.models import zoo

STORED = sorted(path.parent.name for path in zoo.GOLDENS.glob("*/model.safetensors"))


def test_there_is_one_golden_file_for_each_family():
    assert [name.rsplit("-", 1)[0] for name in STORED] == ["bert", "distilbert", "roberta", "xlm-roberta"]


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("name", STORED)
def test_outputs_and_hidden_states(name, scanned):
    folder = zoo.GOLDENS / name
    model, params = zoo.from_folder(folder)
    batch = dict(np.load(folder / "inputs.npz"))
    want = dict(np.load(folder / "outputs.npz"))
    got = zoo.outputs(model, zoo.stacked(params) if scanned else params, batch)
    got |= {f"hidden_states/{i}": got["captured"][name] for i, name in enumerate(zoo.boundaries(model))}
    assert set(want) <= set(got)
    for output, value in want.items():
        zoo.assert_close(got[output], value)
