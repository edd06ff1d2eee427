"""Recipes for models of the hub: each is read, and fits its model as far as shapes and compilation go."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import config as configs
from jaxtransfer.adapt import groups
from jaxtransfer.job.optimization import optimizer_groups, recipe
from jaxtransfer.models import family
from jaxtransfer.models.api import abstract_init
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.optim import optimizer
from jaxtransfer.step import init_state, make_step
from jaxtransfer.types import Head
from tests.models.test_decoders import PUBLISHED

FOLDER = Path(__file__).parent.parent / "configs"
IMAGES = {
    "microsoft/resnet-50": {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "depths": [3, 4, 6, 3],
        "downsample_in_first_stage": False, "embedding_size": 64, "hidden_act": "relu",
        "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck", "num_channels": 3,
    },
    "facebook/dinov2-small": {
        "model_type": "dinov2", "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 384,
        "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-06, "layerscale_value": 1.0,
        "mlp_ratio": 4, "num_attention_heads": 6, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 14,
        "qkv_bias": True, "use_swiglu_ffn": False,
    },
}  # fmt: skip
HUB = sorted(path.stem for path in FOLDER.glob("hub/*.yaml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("hub/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_hub_is_read_and_names_its_command(path):
    assert configs.load(path).data.train.path
    assert f"jaxtransfer run {path.relative_to(FOLDER.parent)}" in path.read_text()


def lowered(name):
    """The training step of a recipe, traced on the abstract parameters of the model that it names."""
    config = configs.load(FOLDER / "hub" / f"{name}.yaml")
    rows = config.data.batch
    if config.source.ref in IMAGES:
        raw, head = IMAGES[config.source.ref], Head("image-classification", ("a", "b", "c"))
        batch = {"pixel_values": jnp.zeros((rows, 224, 224, 3)), "labels": jnp.zeros(rows, jnp.int32)}
    else:
        raw, head = PUBLISHED[config.source.ref][1], Head("causal-lm")
        ids = jnp.zeros((rows, config.task.max_length), jnp.int32)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    model = family(raw["model_type"]).build(raw, head)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.source.dtype or x.dtype)), abstract_init(model)
    )
    labels = groups.labels_of(model, recipe(config, model), shapes)
    tx = optimizer(labels, optimizer_groups(config, labels, 100), clip=config.optimizer.clip)
    start = partial(init_state, model, labels=labels, tx=tx, key=jax.random.key(0))
    state, frozen = jax.eval_shape(start, shapes)
    step = make_step(
        model, cross_entropy(), tx, precision=jnp.dtype(config.run.precision), remat=config.run.remat,
        accumulate=config.run.accumulate,
    )  # fmt: skip
    return shapes, state, step.lower(state, frozen, batch | {"weight": jnp.ones(rows)})


@pytest.mark.parametrize("name", HUB)
def test_a_recipe_of_the_hub_fits_its_model(name):
    shapes, state, program = lowered(name)
    count, trained = (sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) for tree in (shapes, state.params))
    assert 0 < trained <= count
    assert ("llama" in name or "qwen" in name or "gemma" in name) == (trained < count / 2)
    # The blocks are scanned, but for convolutions on a CPU.
    assert ("while" in program.as_text()) != (name == "resnet-50" and jax.default_backend() == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_a_recipe_of_the_hub_compiles(name):
    _, state, program = lowered(name)
    memory = program.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
