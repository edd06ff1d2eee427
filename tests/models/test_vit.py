"""ViT, DeiT and DINOv2: parity with torch, name tables, exports, stochastic depth, the cost of freezing, bad input."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtransfer.adapt import groups
from jaxtransfer.models import family, init
from jaxtransfer.models.api import abstract_init, apply, layout_of
from jaxtransfer.models.interpolation import resize_matrix
from jaxtransfer.models.names import turn
from jaxtransfer.models.registry import ConfigFieldError
from jaxtransfer.models.vision import TENSOR_RULES, drop_path
from jaxtransfer.objectives import cross_entropy
from jaxtransfer.parallel import make_mesh, shardings
from jaxtransfer.source import export, load
from jaxtransfer.step import make_step, shard_batch
from jaxtransfer.tree import flatten, partition, unstack
from jaxtransfer.types import Head, State
from tests import tiny, torch_reference
from tests.models import vision_zoo, zoo

ODD = {"image_size": (8, 15), "patch_size": (4, 5), "num_channels": 2, "qkv_bias": False, "hidden_act": "gelu_new"}
POOLED = ODD | {"pooler_output_size": 7, "pooler_act": "relu"}
SWIGLU = {"use_swiglu_ffn": True, "layerscale_value": 0.3, "qkv_bias": False, "use_mask_token": False}
CASES = {  # family, head, overrides, size of the images
    "vit": ("vit", "imgcls", ODD, (8, 15)),
    "deit": ("deit", "teacher", {}, (20, 20)),
    "dinov2": ("dinov2", "imgcls", {}, (15, 35)),
    "vit-bare": ("vit", "model", POOLED, (8, 15)),
    "vit-square": ("vit", "imgcls", {"layer_norm_eps": 1e-5}, (20, 20)),
    "deit-bare": ("deit", "model", POOLED, (8, 15)),
    "deit-student": ("deit", "imgcls", ODD, (8, 15)),
    "dinov2-swiglu": ("dinov2", "imgcls", SWIGLU, (30, 20)),
    "dinov2-bare": ("dinov2", "model", {"image_size": (8, 10), "patch_size": (4, 5)}, (8, 10)),
    "dinov2-own-size": ("dinov2", "imgcls", {}, (20, 20)),
}
FAST = ("vit", "deit", "dinov2")
RAW = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "initializer_range": 0.3,
}
DINO = {name: value for name, value in RAW.items() if name != "intermediate_size"} | {"mlp_ratio": 2}


def tiny_vit(name="vit", **raw):
    return vision_zoo.tiny(name, **(DINO if name == "dinov2" else RAW) | raw)


def check(theirs, src, params, size, dtype=np.float32, tolerance=1e-5, **tolerances):
    """Outputs, hidden states and gradients in evaluation mode."""
    batch = {"pixel_values": vision_zoo.images(3, *size, src.model.config.num_channels, dtype=dtype)}
    want = torch_reference.outputs(theirs, batch)
    boundaries = tuple(zoo.boundaries(src.model))
    got = vision_zoo.outputs(src.model, params, batch, boundaries, dtype)
    states = want.pop("hidden_states")
    shown = {"last_hidden_state", "pooler_output"} if src.model.head is None else {"logits", "last_hidden_state"}
    assert shown <= set(want) == set(got) - {"captured"}
    for name, value in want.items():
        zoo.assert_close(got[name], value, tolerance)
    for name, state in zip(boundaries, states, strict=True):
        zoo.assert_close(got["captured"][name], state, tolerance)

    rng = np.random.default_rng(1)
    cotangents = {name: rng.standard_normal(want[name].shape).astype(dtype) for name in sorted(shown)}
    stored = torch_reference.gradients(theirs, batch, cotangents)
    found = flatten(unstack(vision_zoo.gradients(src.model, params, batch, cotangents, dtype)))
    plan = family(src.model.family).names(src.model).load_plan(stored, list(found))
    grads = {path: turn(stored[name], how) for path, (name, how) in plan.used.items()}
    zoo.assert_gradients_close(found, grads, **tolerances)


@pytest.mark.torch
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_outputs_and_gradients(name):
    kind, head, overrides, size = CASES[name]
    theirs, src = vision_zoo.from_torch(kind, head, **overrides)
    assert layout_of(src.model, src.params) == {"blocks": ((0, 3),)}
    check(theirs, src, vision_zoo.stacked(src), size)


@pytest.mark.parametrize("name", FAST)
def test_goldens(name):
    """Parity where torch is absent: outputs that it gave once."""
    folder = zoo.GOLDENS / "images" / name
    src = load(folder)
    batch, want = (dict(np.load(folder / f"{kind}.npz")) for kind in ("inputs", "outputs"))
    boundaries = tuple(zoo.boundaries(src.model))
    got = vision_zoo.outputs(src.model, vision_zoo.stacked(src), batch, boundaries)
    got |= {f"hidden_states/{i}": got["captured"][name] for i, name in enumerate(boundaries)}
    assert {"logits", "last_hidden_state", "hidden_states/3"} <= set(want) <= set(got)
    for output, value in want.items():
        zoo.assert_close(got[output], value)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_outputs_and_gradients_unrolled(name):
    kind, head, overrides, size = CASES[name]
    theirs, src = vision_zoo.from_torch(kind, head, **overrides)
    check(theirs, src, src.params, size)


@pytest.mark.torch
def test_in_float64():
    kind, head, overrides, size = CASES["vit"]
    theirs, src = vision_zoo.from_torch(kind, head, "float64", **overrides)
    theirs.set_attn_implementation("sdpa")  # the eager one rounds to float32
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, vision_zoo.stacked(src))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}
        check(theirs, src, params, size, np.float64, 1e-9, largest=1e-9, relative=1e-9)


@pytest.mark.torch
def test_masked_patches():
    import torch

    theirs, src = vision_zoo.from_torch("dinov2", "model")
    pixels = vision_zoo.images(3, 20, 20)
    mask = np.random.default_rng(0).random((3, 16)) < 0.4
    with torch.no_grad():
        want = theirs(torch_reference.tensor(pixels), bool_masked_pos=torch.from_numpy(mask)).last_hidden_state.numpy()
    batch = {"pixel_values": pixels, "bool_masked_pos": mask}
    got = vision_zoo.outputs(src.model, src.params, batch)["last_hidden_state"]
    zoo.assert_close(got, want)
    assert (
        np.abs(got - vision_zoo.outputs(src.model, src.params, {"pixel_values": pixels})["last_hidden_state"]).max()
        > 0.1
    )


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 3)), ((5, 3), (5, 9)), ((6, 6), (2, 11)), ((1, 2), (3, 4))])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_interpolation_is_torch_s(kernel, old, new):
    import torch

    grid = np.random.default_rng(0).standard_normal((*old, 6)).astype(np.float32)
    planes = torch.from_numpy(grid).permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(planes, size=new, mode=kernel, align_corners=False)[0].permute(1, 2, 0)
    rows, columns = (resize_matrix(a, b, kernel) for a, b in zip(old, new, strict=True))
    zoo.assert_close(np.einsum("ai,bj,ijd->abd", rows, columns, grid), want.numpy())


def test_interpolation_keeps_what_it_must():
    assert np.array_equal(resize_matrix(5, 5), np.eye(5)) and np.array_equal(resize_matrix(5, 5, "bilinear"), np.eye(5))
    for sizes in ((3, 8), (8, 3), (1, 4)):
        assert np.allclose(resize_matrix(*sizes).sum(1), 1.0)


# Heads


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_pooling_by_the_mean_leaves_special_tokens_out(name, tmp_path):
    head = Head("image-classification", ("cat", "dog"), pooling="mean")
    src = tiny_vit(name, head=head)
    got = vision_zoo.outputs(src.model, src.params, {"pixel_values": vision_zoo.images(2, 12, 12)})
    out = src.params["head"]["out"]
    assert out["kernel"].shape == (12, 2)
    zoo.assert_close(got["logits"], got["last_hidden_state"][:, -9:].mean(1) @ out["kernel"] + out["bias"][None])
    with pytest.raises(ConfigFieldError, match="pooling='mean' has no Hugging Face class"):
        export(src, tmp_path / "out")


def test_a_pooler_is_kept_by_a_bare_trunk_alone():
    bare = family("vit").build(RAW, None)
    assert [stage.name for stage in bare.stages][-2:] == ["norm", "pooler"]
    assert family("vit").rehead(bare, None).stages[-1].name == "pooler"
    assert [stage.name for stage in family("vit").rehead(bare, vision_zoo.CLASSIFIER).stages][-2:] == ["norm", "head"]
    assert family("vit").build(RAW, None, pooler=False).stages[-1].name == "norm"
    assert family("dinov2").build(DINO, None).stages[-1].name == "norm"


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("vit", Head("sequence-classification", ("a",)), "vit has no head of kind 'sequence-classification'"),
        ("vit", Head("distilled-image-classification", ("a",)), "no head of kind 'distilled-image-classification'"),
        ("deit", Head("image-classification", ("a",), pooling="max"), "with pooling 'max'"),
        ("dinov2", Head("image-classification"), "needs labels"),
    ],
)
def test_heads_that_do_not_fit(name, head, message):
    with pytest.raises(ValueError, match=message):
        family(name).rehead(tiny_vit(name).model, head)


# Name tables


@pytest.mark.torch
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "vit-bare", "deit-student", "dinov2-swiglu", "dinov2-bare"])
def test_exports_load_in_transformers_bit_for_bit(name, tmp_path):
    kind, head, overrides, _ = CASES[name]
    theirs, _ = vision_zoo.from_torch(kind, head, **overrides)
    src = load(torch_reference.save(theirs, tmp_path / "theirs"))
    out = export(src, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored, written = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours"))
    assert (
        written == stored | {"label2id": written["label2id"], "id2label": written["id2label"]}
        if head != "model"
        else stored
    )
    want, found = theirs.state_dict(), again.state_dict()
    assert want.keys() == found.keys()
    for key, tensor in want.items():
        assert found[key].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), key
    assert tiny.same_bits(load(out).params, src.params)
    if head == "teacher":
        assert "import AutoImageProcessor, DeiTForImageClassificationWithTeacher" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_a_trunk_drops_what_it_does_not_use(name):
    src = tiny_vit(name)
    kind, bare = family(name), family(name).build({**DINO} if name == "dinov2" else RAW, None, pooler=False)
    stored = [
        theirs for theirs, _ in kind.names(src.model).export_names(flatten(src.params), with_prefix=True).values()
    ]
    surplus = {"classifier.weight", "classifier.bias"}
    more = [f"{name}.pooler.dense.weight", "decoder.0.bias"] + (
        [f"{name}.embeddings.mask_token"] if name != "dinov2" else []
    )
    plan = kind.names(bare).load_plan([*stored, *more], list(flatten(abstract_init(bare))))
    assert set(plan.dropped) == {*surplus, *more}


def test_tensor_rules_cover_every_kernel_of_a_block(devices):
    src, mesh = tiny_vit("dinov2", use_swiglu_ffn=True), make_mesh(data=2, fsdp=2, tensor=2)
    specs = {
        path: where.spec for path, where in flatten(shardings(vision_zoo.stacked(src), mesh, TENSOR_RULES)).items()
    }
    whole = [
        path
        for path, spec in specs.items()
        if path.startswith("blocks/") and path.endswith("/kernel") and not any(spec)
    ]
    assert not whole and specs["blocks/0:3/attention/output/kernel"] == P(None, "tensor", "fsdp")
    assert specs["embed/patch/kernel"] == P(None, None, None, "fsdp")


@pytest.mark.parametrize("name", ["vit", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_a_step_on_a_mesh_is_the_step_on_one_device(name, devices):
    src = tiny_vit(name, hidden_size=16, num_attention_heads=2)
    batch = {"pixel_values": vision_zoo.images(8, 12, 12), "labels": np.arange(8) % 3, "weight": np.ones(8, np.float32)}
    found = []
    for mesh, rules in ((None, ()), (make_mesh(data=2, fsdp=2, tensor=2), TENSOR_RULES)):
        state, frozen, step = tiny.start(src, None, tiny.PLAIN, mesh=mesh, sharding=rules, donate=False)
        after, _ = step(state, frozen, shard_batch(batch, mesh))
        found.append(tiny.gradients(state, after))
    assert tiny.apart(found[1], found[0]) < 1e-5


# Training mode


@functools.partial(jax.jit, static_argnames=("model", "train"))
def trained(model, params, batch, key, train=True):
    return apply(model, params, batch, train=train, key=key)["logits"]


@pytest.mark.parametrize("name", ["vit", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_masks_are_the_same_scanned_and_unrolled(name):
    noise = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.5}
    src, calm = tiny_vit(name, **noise), tiny_vit(name)
    batch = {"pixel_values": vision_zoo.images(4, 12, 12)}
    laid = vision_zoo.stacked(src)
    assert list(laid["blocks"]) == ["0:3"]
    scanned = trained(src.model, laid, batch, jax.random.key(1))
    zoo.assert_close(scanned, trained(src.model, src.params, batch, jax.random.key(1)))
    plain = vision_zoo.outputs(calm.model, src.params, batch)["logits"]
    for other in (trained(src.model, laid, batch, jax.random.key(2)), plain):
        assert np.abs(scanned - other).max() > 0.01 * np.abs(plain).max()
    zoo.assert_close(vision_zoo.outputs(src.model, laid, batch)["logits"], plain)


def test_drop_path_grows_with_depth_and_drops_whole_examples():
    src = tiny_vit("vit", drop_path_rate=0.5, num_hidden_layers=3)
    rates = [stage.constants["drop_path"] for stage in src.model.stages if stage.name.startswith("blocks/")]
    assert rates == [0.0, 0.25, 0.5]
    assert not any(stage.constants for stage in tiny_vit("vit").model.stages)
    x = jnp.ones((4000, 2, 3))
    found = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    assert np.all((found == 0) | np.isclose(found, 1 / 0.75))
    assert np.all(found == found[:, :1, :1]) and abs(found[:, 0, 0].mean() - 1) < 0.05
    assert drop_path(x, 0.25, None) is x


# The cost of what is frozen


def unrolled_flops(model, rules, batch):
    """FLOPs of a step with every layer traced."""
    shapes = abstract_init(model)
    labels = groups.labels_of(model, rules, shapes)
    by_path, tx = flatten(labels), tiny.transform(labels)
    trained, frozen = partition(shapes, lambda path: by_path[path] != "frozen")
    none, scalar = jax.tree.map(lambda _: None, shapes), jax.ShapeDtypeStruct((), jnp.int32)
    state = State(scalar, trained, none, jax.eval_shape(tx.init, trained), jax.random.key(0), {})
    return make_step(model, cross_entropy(), tx).lower(state, frozen, batch).compile().cost_analysis()["flops"]


def minimum(c, rows, depth):
    """Matrix products that cannot be avoided: the lowest layer's first norm trains too, so nothing in it is spared."""
    length, d, layers = c.grid[0] * c.grid[1] + 1, c.hidden_size, c.num_hidden_layers
    square, wide = 2 * rows * length * d * d, 2 * rows * length * d * c.inner
    scores = 2 * rows * length * length * d
    patches = 2 * rows * (length - 1) * c.patch_size[0] * c.patch_size[1] * c.num_channels * d
    total = patches + layers * (4 * square + 2 * wide + 2 * scores)
    if depth == "full":
        return total + patches + 2 * layers * (4 * square + 2 * wide + 2 * scores)
    live = 0 if depth == "head" else depth
    return total + live * 2 * (4 * square + 2 * wide + 2 * scores)


@pytest.mark.parametrize("depth", ["head", 0, 1, 2, "full"])
def test_a_frozen_layer_costs_its_forward_pass_only(depth):
    rows = 8
    raw = RAW | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = family("vit").build(raw | {"image_size": 32, "patch_size": 8}, vision_zoo.CLASSIFIER)
    batch = {"pixel_values": vision_zoo.images(rows, 32, 32), "labels": np.zeros(rows, np.int32)}
    batch["weight"] = np.ones(rows, np.float32)
    recipes = {"head": groups.head_only, "full": groups.full}
    rules = recipes[depth](model) if depth in recipes else groups.last(model, depth)
    assert 1.0 <= unrolled_flops(model, rules, batch) / minimum(model.config, rows, depth) < 1.05


# Bad input


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vit", (2, 12, 12, 1), r"pixel_values: .*num_channels=3 .*\(2, 12, 12, 1\)"),
        ("vit", (2, 12, 14, 3), "images of 12 x 14 do not divide into patches of patch_size=4 x 4"),
        ("dinov2", (2, 13, 12, 3), "images of 13 x 12 do not divide into patches of patch_size=4 x 4"),
        ("vit", (2, 16, 12, 3), r"image_size=\(12, 12\): .* resize.resize_positions\(source, \(16, 12\)\)"),
        ("deit", (2, 12, 24, 3), r"image_size=\(12, 12\): .* resize.resize_positions\(source, \(12, 24\)\)"),
    ],
)
def test_images_that_do_not_fit(name, shape, message):
    src = tiny_vit(name)
    with pytest.raises(ValueError, match=message):
        vision_zoo.outputs(src.model, src.params, {"pixel_values": np.zeros(shape, np.float32)})


def test_masks_without_a_mask_token_are_refused():
    src = tiny_vit()
    batch = {"pixel_values": vision_zoo.images(2, 12, 12), "bool_masked_pos": np.zeros((2, 9), bool)}
    with pytest.raises(ValueError, match="bool_masked_pos: the model has no mask token"):
        vision_zoo.outputs(src.model, src.params, batch)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit", {"hidden_act": "gelu_fast"}, "hidden_act: 'gelu_fast' is not one of"),
        ("deit", {"pooler_act": "softsign"}, "pooler_act: 'softsign' is not one of"),
        ("vit", {"num_attention_heads": 5}, "hidden_size=12 does not divide by num_attention_heads=5"),
        ("vit", {"image_size": 14}, r"image_size=\(14, 14\): .* multiples of patch_size=\(4, 4\)"),
        ("vit", {"image_size": [12, 12, 12]}, r"image_size=\(12, 12, 12\): height and width"),
        ("vit", {"patch_size": 0}, r"multiples of patch_size=\(0, 0\)"),
        ("vit", {"patch_size": "4"}, "patch_size: expected a list, found '4'"),
        ("vit", {"num_channels": 0}, "num_channels=0"),
        ("dinov2", {"drop_path_rate": 1.0}, r"drop_path_rate=1.0.*expected \[0, 1\)"),
        ("dinov2", {"image_size": [12, 16]}, "image_size=.* the positions of dinov2 must form a square"),
        ("vit", {"intermediate_size": None}, "config lacks intermediate_size"),
        ("vit", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True is unknown and may change what the model computes"),
        ("dinov2", {"intermediate_size": 20}, "intermediate_size=20 is unknown"),
        ("dinov2", {"head_dim": 8}, "head_dim=8 is unknown"),
        ("dinov2", {"use_swiglu_ffn": 1}, "use_swiglu_ffn: expected bool, found 1"),
    ],
)
def test_configurations_that_do_not_fit(name, fields, message):
    raw = DINO if name == "dinov2" else RAW
    with pytest.raises(ConfigFieldError, match=message):
        family(name).build(raw | fields, None)


def test_published_fields_are_read_or_known():
    config = family("dinov2").build(DINO | {"out_features": ["stage3"], "apply_layernorm": True}, None).config
    assert (config.layer_norm_eps, config.inner, config.grid) == (1e-6, 24, (3, 3))
    assert (
        family("vit").build(RAW | {"encoder_stride": 16, "pooler_output_size": None}, None).config.layer_norm_eps
        == 1e-12
    )
    assert dataclasses.replace(config, hidden_size=1536, mlp_ratio=4.0, use_swiglu_ffn=True).inner == 4096
    assert init(tiny_vit("dinov2", layerscale_value=0.1).model, jax.random.key(0))["blocks"]["0"]["mlp"]["scale"][
        0
    ] == np.float32(0.1)
