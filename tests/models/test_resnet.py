"""ResNet: parity with torch, name tables, exports, the cost of freezing, bad input.

What its statistics do in training is in test_running_statistics.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import groups
from jaxtransfer.models import family
from jaxtransfer.models.api import abstract_init, apply, layout_of
from jaxtransfer.models.names import MappingError, turn
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.parallel import fsdp, make_mesh, place, shardings
from jaxtransfer.source import export, load
from jaxtransfer.step import make_step
from jaxtransfer.tree import TreeError, flatten, partition, stack, unstack
from jaxtransfer.types import Head, State
from tests import tiny, torch_reference
from tests.models import vision_zoo, zoo

BOTTLENECK = {"embedding_size": 5, "hidden_sizes": (8, 20), "depths": (3, 2), "layer_type": "bottleneck"}
EARLY = BOTTLENECK | {"downsample_in_bottleneck": True, "downsample_in_first_stage": True}
EARLY |= {"num_channels": 1, "hidden_act": "silu"}
CASES = {
    "basic": ({}, (37, 45)),
    "early": (EARLY, (61, 40)),
    "bottleneck": (BOTTLENECK, (37, 45)),
    "identity": ({"embedding_size": 8, "hidden_act": "gelu", "depths": (3, 1)}, (32, 33)),
    "three": (BOTTLENECK | {"hidden_sizes": (4, 8, 12), "depths": (1, 2, 1)}, (65, 39)),
}
FAST = ("basic", "early")
RAW = {"embedding_size": 6, "hidden_sizes": (8, 12), "depths": (2, 3), "layer_type": "basic"}


def boundaries(model):
    """The boundaries at which torch gives hidden states: the stem, and the end of each list."""
    lists = {stage.name.rpartition("/")[0]: stage.name for stage in model.stages if "/" in stage.name}
    return ("embed", *lists.values())


def channels_last(x):
    """An output of transformers as ours: channels last, and no height and width of one."""
    x = np.moveaxis(x, 1, -1) if x.ndim == 4 else x
    return x[:, 0, 0] if x.ndim == 4 and x.shape[1:3] == (1, 1) else x


def check(theirs, src, params, size, dtype=np.float32, tolerance=1e-5, **tolerances):
    """Outputs, hidden states and gradients in evaluation mode."""
    batch = {"pixel_values": vision_zoo.images(3, *size, src.model.config.num_channels, dtype=dtype)}
    want = torch_reference.outputs(theirs, batch)
    got = vision_zoo.outputs(src.model, params, batch, boundaries(src.model), dtype)
    shown = "logits" if src.model.head else "last_hidden_state"
    for name in ("last_hidden_state", "pooler_output", shown):
        zoo.assert_close(got[name], channels_last(want[name]), tolerance)
    for name, state in zip(boundaries(src.model), want["hidden_states"], strict=True):
        zoo.assert_close(got["captured"][name], channels_last(state), tolerance)

    cotangent = np.random.default_rng(1).standard_normal(want[shown].shape).astype(dtype)
    stored = torch_reference.gradients(theirs, batch, {shown: cotangent})
    ours = {shown: channels_last(cotangent)}
    found = flatten(unstack(vision_zoo.gradients(src.model, params, batch, ours, dtype)))
    found = {path: leaf for path, leaf in found.items() if not path.endswith(("/mean", "/var"))}
    plan = family("resnet").names(src.model).load_plan(stored, list(found))
    want = {path: turn(stored[name], how) for path, (name, how) in plan.used.items()}
    zoo.assert_gradients_close(found, want, **tolerances)


@pytest.mark.torch
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_outputs_and_gradients(name):
    overrides, size = CASES[name]
    theirs, src = vision_zoo.from_torch("resnet", "imgcls" if name != "three" else "model", **overrides)
    check(theirs, src, vision_zoo.stacked(src), size)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_outputs_and_gradients_unrolled(name):
    overrides, size = CASES[name]
    theirs, src = vision_zoo.from_torch("resnet", "imgcls", **overrides)
    check(theirs, src, src.params, size)


@pytest.mark.torch
def test_in_float64():
    overrides, size = CASES["bottleneck"]
    theirs, src = vision_zoo.from_torch("resnet", "imgcls", "float64", **overrides)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, vision_zoo.stacked(src))
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
        assert kinds == {"float64", "int32"}
        check(theirs, src, params, size, np.float64, 1e-9, largest=1e-9, relative=1e-9)


def test_like_blocks_are_stacked():
    src = vision_zoo.tiny("resnet", **RAW | {"embedding_size": 8})
    assert layout_of(src.model, src.params) == {"stage0": ((0, 2),), "stage1": ((0, 1), (1, 3))}
    names = [stage.name for stage in src.model.stages]
    assert names == ["embed", "stage0/0", "stage0/1", "stage1/0", "stage1/1", "stage1/2", "pooler", "head"]
    assert "shortcut" not in src.params["stage0"]["0"] and "shortcut" in src.params["stage1"]["0"]
    # Of one shape all three, but the first has a stride, which no shape shows.
    strided = vision_zoo.tiny("resnet", **RAW | {"embedding_size": 8, "downsample_in_first_stage": True})
    assert layout_of(strided.model, strided.params)["stage0"] == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"layer_type": "basic", "hidden_sizes": (64, 128, 256, 512), "depths": (2, 2, 2, 2)}, 11_689_512),
        ({}, 25_557_032),
    ],
    ids=["resnet-18", "resnet-50"],
)
def test_they_are_as_large_as_the_published_ones(fields, count):
    model = family("resnet").build(fields, Head("image-classification", tuple(map(str, range(1000)))))
    shapes = flatten(abstract_init(model))
    assert sum(leaf.size for path, leaf in shapes.items() if not path.endswith(("/mean", "/var", "/count"))) == count


# Name tables


@pytest.mark.torch
@pytest.mark.parametrize("head", ["imgcls", "model"])
def test_exports_load_in_transformers_bit_for_bit(head, tmp_path):
    import transformers

    theirs, _ = vision_zoo.from_torch("resnet", head)
    src = load(torch_reference.save(theirs, tmp_path / "theirs"))
    assert src.params["embed"]["norm"]["count"].dtype == jnp.int32
    tracked = theirs.base_model.embedder.embedder.normalization.num_batches_tracked
    assert int(src.params["embed"]["norm"]["count"]) == int(tracked) > 500
    out = export(src, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(again, getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0]))
    want, found = theirs.state_dict(), again.state_dict()
    assert want.keys() == found.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name
    assert tiny.same_bits(load(out).params, src.params)


def test_a_trunk_drops_the_head_of_another_task():
    src = vision_zoo.tiny("resnet", **RAW)
    kind, bare = family("resnet"), family("resnet").rehead(src.model, None)
    stored = [name for name, _ in kind.names(src.model).export_names(flatten(src.params), with_prefix=True).values()]
    plan = kind.names(bare).load_plan(stored, list(flatten(abstract_init(bare))))
    assert plan.dropped == dict.fromkeys(("classifier.1.weight", "classifier.1.bias"), "the head of another task")
    assert not plan.zeros


def torchvision_module(config, labels):
    """The module of torchvision's ResNet, and its names, for a configuration of ours."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            if config.layer_type == "basic":
                sizes, widths, strides = (3, 3), (inputs, width, width), (stride, 1)
            else:
                sizes, widths, strides = (1, 3, 1), (inputs, width // 4, width // 4, width), (1, stride, 1)
            self.count = len(sizes)
            for i, size in enumerate(sizes):
                layer = nn.Conv2d(widths[i], widths[i + 1], size, strides[i], size // 2, bias=False)
                setattr(self, f"conv{i + 1}", layer)
                setattr(self, f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
            self.downsample = None
            if stride != 1 or inputs != width:
                down = nn.Conv2d(inputs, width, 1, stride, bias=False)
                self.downsample = nn.Sequential(down, nn.BatchNorm2d(width))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.count else y
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        base_model_prefix = ""
        all_tied_weights_keys = ()

        def __init__(self):
            super().__init__()
            inputs = config.embedding_size
            self.conv1 = nn.Conv2d(config.num_channels, inputs, 7, 2, 3, bias=False)
            self.bn1, self.maxpool = nn.BatchNorm2d(inputs), nn.MaxPool2d(3, 2, 1)
            for i, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
                first = Block(inputs, width, 2 if i else 1)
                rest = [Block(width, width, 1) for _ in range(depth - 1)]
                setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
                inputs = width
            self.fc = nn.Linear(inputs, labels)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            for i in range(1, len(config.depths) + 1):
                x = getattr(self, f"layer{i}")(x)
            return self.fc(x.mean((2, 3)))

    module = ResNet()
    torch_reference.redraw(module, 0)
    return module.eval()


@pytest.mark.torch
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_the_names_of_torchvision_and_timm(layer_type, tmp_path):
    import torch
    from safetensors.torch import save_file

    raw = RAW | {"model_type": "resnet", "layer_type": layer_type, "architectures": ["ResNetForImageClassification"]}
    raw |= {"num_labels": 3}
    theirs = torchvision_module(family("resnet").build(raw, None).config, 3)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    src = load(tmp_path)
    assert int(src.params["stage1"]["2"]["layer1"]["norm"]["count"]) == int(theirs.layer2[2].bn2.num_batches_tracked)
    batch = {"pixel_values": vision_zoo.images(2, 37, 45)}
    with torch.no_grad():
        want = theirs(torch_reference.tensor(batch["pixel_values"])).numpy()
    zoo.assert_close(vision_zoo.outputs(src.model, src.params, batch)["logits"], want)

    # Old files have no counts. One count that is missing among others is damage.
    bare = {name: leaf for name, leaf in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(bare, tmp_path / "model.safetensors")
    old = load(tmp_path, head=None)
    assert set(old.lineage.dropped) == {"fc.weight", "fc.bias"}
    counts = {path: leaf for path, leaf in flatten(old.params).items() if path.endswith("count")}
    assert counts and all(leaf.dtype == jnp.int32 and int(leaf) == 0 for leaf in counts.values())
    save_file(bare | {"bn1.num_batches_tracked": torch.tensor(7)}, tmp_path / "model.safetensors")
    missing = rf"\(0 tensors unmapped, {len(counts) - 1} unfilled\): parameter stage0/0/layer0/norm/count has no tensor"
    with pytest.raises(MappingError, match=missing):
        load(tmp_path)


# Sharding, and the cost of what is frozen


def test_fsdp_splits_kernels_of_any_rank(devices):
    src, mesh = vision_zoo.tiny("resnet", **RAW | {"hidden_sizes": (8, 16)}), make_mesh(fsdp=8)
    rules = fsdp(src.params, mesh, min_size=64)
    laid = vision_zoo.stacked(src)
    specs = {path: where.spec for path, where in flatten(shardings(laid, mesh, rules)).items()}
    assert specs["stage1/1:3/layer0/conv/kernel"] == P(None, None, None, "fsdp")
    assert specs["stage1/1:3/layer0/norm/count"] == specs["embed/norm/mean"] == P()
    assert flatten(place(laid, mesh, rules))["stage1/1:3/layer0/conv/kernel"].addressable_shards[0].data.shape[3] == 2


def pairs(size, kernel, stride):
    """How often a kernel's taps meet the image along an axis, and the number of outputs."""
    outputs = (size + 2 * (kernel // 2) - kernel) // stride + 1
    taps = [o * stride + k - kernel // 2 for o in range(outputs) for k in range(kernel)]
    return sum(0 <= at < size for at in taps), outputs


def minimum(model, rows, size, live):
    """Multiplications and additions that cannot be avoided: forward, and two of the same where the stages train.

    The lowest stage that trains needs no gradient of its input.
    """
    c = model.config
    convolutions = {}

    def conv(stage, size, inputs, outputs, kernel, stride, first):
        met, after = pairs(size, kernel, stride)
        convolutions.setdefault(stage, []).append((2 * rows * met**2 * inputs * outputs, first))
        return after

    size = conv("embed", size, c.num_channels, c.embedding_size, 7, 2, True)
    size, inputs = pairs(size, 3, 2)[1], c.embedding_size
    for i, (width, depth) in enumerate(zip(c.hidden_sizes, c.depths, strict=True)):
        for j in range(depth):
            stage, stride = f"stage{i}/{j}", 2 if i and not j else 1
            if inputs != width or stride != 1:
                conv(stage, size, inputs, width, 1, stride, True)
            after = conv(stage, size, inputs, width, 3, stride, True)
            size, inputs = conv(stage, after, width, width, 3, 1, False), width
    total = sum(flops for found in convolutions.values() for flops, _ in found)
    for stage in live:
        for flops, first in convolutions.get(stage, ()):
            total += flops * (1 if first and stage == live[0] else 2)
    return total


def unrolled_flops(model, rules, batch):
    """FLOPs of a step with every layer traced."""
    shapes = abstract_init(model)
    labels = groups.labels_of(model, rules, shapes)
    by_path, tx = flatten(labels), tiny.transform(labels)
    frozen, rest = partition(shapes, lambda path: by_path[path] == "frozen")
    stats, trained = partition(rest, lambda path: by_path[path] == "stats")
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = State(scalar, trained, stats, jax.eval_shape(tx.init, trained), jax.random.key(0), {})
    step = make_step(model, cross_entropy(), tx)
    return step.lower(state, frozen, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("depth", ["head", 0, 1, 2, 3, "full"])
def test_a_frozen_layer_costs_its_forward_pass_only(depth):
    rows, size = 8, 32
    raw = {"embedding_size": 32, "hidden_sizes": (128, 192), "depths": (1, 2), "layer_type": "basic"}
    model = family("resnet").build(raw, vision_zoo.CLASSIFIER)
    batch = {"pixel_values": vision_zoo.images(rows, size, size), "labels": np.zeros(rows, np.int32)}
    batch["weight"] = np.ones(rows, np.float32)
    recipes = {"head": groups.head_only, "full": groups.full}
    rules = recipes[depth](model) if depth in recipes else groups.last(model, depth)
    names = [stage.name for stage in model.stages]
    first = {"head": len(names) - 1, "full": 0}.get(depth, None)
    live = names[(len(names) - 2 - depth) if first is None else first :]
    assert 1.0 <= unrolled_flops(model, rules, batch) / minimum(model, rows, size, live) < 1.05


# Bad input


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixel_values": np.zeros((2, 8, 8, 1), np.float32)}, r"pixel_values: .*num_channels=3 .*\(2, 8, 8, 1\)"),
        ({"pixel_values": np.zeros((2, 3, 8, 8), np.float32)}, r"pixel_values: .*: the channels come last"),
        ({"pixel_values": np.zeros((8, 8, 3), np.float32)}, r"pixel_values: expected \(rows, height, width, 3\)"),
        ({"pixel_values": np.zeros((2, 8, 8, 3), np.uint8)}, "pixel_values: expected normalised floats, found uint8"),
        ({"input_ids": np.zeros((2, 8), np.int32)}, "pixel_values: the batch has none, only input_ids"),
    ],
)
def test_images_that_do_not_fit(batch, message):
    src = vision_zoo.tiny("resnet", **RAW)
    with pytest.raises(ValueError, match=message):
        vision_zoo.outputs(src.model, src.params, batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_type": "inverted"}, "layer_type: 'inverted' is not one of"),
        ({"hidden_act": "gelu_fast"}, "hidden_act: 'gelu_fast' is not one of"),
        ({"depths": [2]}, r"depths=\(2,\): one number for each of hidden_sizes=\(8, 12\)"),
        ({"depths": [2, 0]}, "depths must be positive"),
        ({"hidden_sizes": [8, "12"]}, r"hidden_sizes\[1\]: expected int, found '12'"),
        ({"layer_type": "bottleneck", "hidden_sizes": [2, 4]}, "hidden_sizes at least 4"),
        ({"output_stride": 8}, "output_stride=8 is unknown and may change what the model computes"),
    ],
)
def test_configurations_that_do_not_fit(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        family("resnet").build(RAW | fields, None)
    assert family("resnet").build(RAW | {"out_features": ["stage2"], "stage_names": ["stem"]}, None)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head("sequence-classification", ("a",)), "resnet has no head of kind 'sequence-classification'"),
        (Head("image-classification", ("a",), pooling="mean"), "with pooling 'mean'"),
        (Head("image-classification"), "needs labels"),
    ],
)
def test_heads_that_do_not_fit(head, message):
    model = vision_zoo.tiny("resnet", **RAW).model
    with pytest.raises(ValueError, match=message):
        family("resnet").rehead(model, head)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere stacks of convolutions are loops")
def test_on_a_cpu_stacked_convolutions_are_no_loop():
    """In XLA's loops the gradient of a convolution takes up to thirty times as long."""
    src = vision_zoo.tiny("resnet", **RAW | {"embedding_size": 8})
    params, batch = vision_zoo.stacked(src), {"pixel_values": vision_zoo.images(1, 32, 32)}
    assert "0:2" in params["stage0"]
    text = jax.jit(lambda params: apply(src.model, params, batch)["logits"]).lower(params).as_text()
    assert "stablehlo.convolution" in text and "stablehlo.while" not in text


def test_a_stack_across_a_stride_is_refused():
    """Blocks of one structure whose functions differ: laid out by hand, past `layout_of`."""
    src = vision_zoo.tiny("resnet", **RAW | {"embedding_size": 8, "downsample_in_first_stage": True})
    params = {**src.params, "stage0": {"0": src.params["stage0"]["1"], "1": src.params["stage0"]["1"]}}
    with pytest.raises(TreeError, match="stage0/0:2 are stacked, but their stages are not alike"):
        vision_zoo.outputs(
            src.model, stack(params, {"stage0": ((0, 2),)}), {"pixel_values": vision_zoo.images(1, 8, 8)}
        )
