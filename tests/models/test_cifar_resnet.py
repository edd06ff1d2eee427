"""The CIFAR ResNets: published weights reach their accuracy, shortcuts have no parameters, transformers has neither."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtransfer.adapt import swap_head
from jaxtransfer.models import family, init
from jaxtransfer.models.api import abstract_init
from jaxtransfer.models.cifar_resnet import shortcut
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.source import export, load
from jaxtransfer.tree import flatten
from tests import tiny
from tests.models import vision_zoo

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "cifar-resnet20.json"
RAW = {"depth": 8, "hidden_sizes": (4, 6, 10)}
MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.mark.data
def test_the_published_weights_reach_their_accuracy(data_root):
    """81.35 % of the 2,000 recompressed images, as measured with torch; 91.8 % of the originals, which are not here."""
    src = load(data_root / "weights" / "resnet20-12fca82f.safetensors", config=CONFIG)
    params = vision_zoo.stacked(src)
    data = np.load(data_root / "images" / "cifar10_5000_2000.npz")
    assert src.model.head.labels == tuple(data["classes"])
    images = ((data["x_test"] / np.float32(255) - MEAN) / DEVIATION).astype(np.float32)
    parts = [vision_zoo.outputs(src.model, params, {"pixel_values": part}) for part in np.split(images, 4)]
    guesses = np.concatenate([np.asarray(found["logits"]).argmax(-1) for found in parts])
    assert parts[0]["pooler_output"].shape == (500, 64)
    assert abs(np.mean(guesses == data["y_test"]) - 0.8135) <= 0.002


def test_the_shortcut_takes_every_second_pixel_between_channels_of_zeros():
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 4)).astype(np.float32)
    found = np.asarray(shortcut(x, 2, 10))
    assert found.shape == (2, 3, 3, 10)
    assert np.array_equal(found[..., 3:7], x[:, ::2, ::2]) and not found[..., :3].any() and not found[..., 7:].any()


def test_it_has_as_many_layers_with_weights_as_its_depth_says():
    raw = json.loads(CONFIG.read_text())
    for depth in (20, 56):
        model = family("cifar-resnet").build(raw | {"depth": depth}, vision_zoo.CLASSIFIER)
        kernels = [path for path in flatten(abstract_init(model)) if path.endswith("kernel")]
        assert len(kernels) == depth
    src = vision_zoo.tiny("cifar-resnet", **RAW)
    names = [stage.name for stage in src.model.stages]
    assert names == ["embed", "stage0/0", "stage1/0", "stage2/0", "pooler", "head"]
    found = vision_zoo.outputs(src.model, src.params, {"pixel_values": vision_zoo.images(2, 9, 7)})
    shapes = {name: leaf.shape for name, leaf in found.items()}
    assert shapes == {"last_hidden_state": (2, 3, 2, 10), "pooler_output": (2, 10), "logits": (2, 3)}


def test_fresh_parameters():
    """From scratch: He's normal distribution over the fan out, statistics of nothing seen."""
    model = family("cifar-resnet").build({"depth": 8, "hidden_sizes": (32, 32, 32)}, None)
    params = init(model, jax.random.key(0))
    layer = params["stage1"]["0"]["layer1"]
    assert np.isclose(np.std(layer["conv"]["kernel"]), (2 / (9 * 32)) ** 0.5, rtol=0.05)
    norm = {name: np.asarray(leaf) for name, leaf in layer["norm"].items()}
    assert (norm["scale"] == 1).all() and (norm["var"] == 1).all() and norm["count"] == 0
    assert not norm["bias"].any() and not norm["mean"].any()


def test_transformers_has_no_such_model(tmp_path):
    src = vision_zoo.tiny("cifar-resnet", **RAW)
    for source in (src, swap_head(src, vision_zoo.CLASSIFIER, jax.random.key(0))):
        with pytest.raises(ConfigFieldError, match="transformers has no cifar-resnet: export with format='orbax'"):
            export(source, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    again = load(export(src, tmp_path / "out", format="orbax"))
    assert tiny.same_bits(again.params, src.params) and again.model.head == src.model.head
    assert again.model.config == src.model.config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 9}, r"depth=9: expected 2 \+ 6 n for 3 hidden_sizes"),
        ({"depth": 2}, "depth=2"),
        ({"hidden_sizes": [16, 31, 64]}, r"hidden_sizes=\(16, 31, 64\): each must .* exceed the one before by an even"),
        ({"hidden_sizes": []}, r"hidden_sizes=\(\)"),
        ({"num_channels": 0}, "num_channels=0 must be positive"),
        ({"shortcut": "B"}, "shortcut='B' is unknown and may change what the model computes"),
    ],
)
def test_configurations_that_do_not_fit(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        family("cifar-resnet").build(RAW | fields, None)


def test_images_of_other_channels():
    src = vision_zoo.tiny("cifar-resnet", **RAW)
    with pytest.raises(ValueError, match=r"pixel_values: .*num_channels=3"):
        vision_zoo.outputs(src.model, src.params, {"pixel_values": vision_zoo.images(2, 8, 8, 1)})
