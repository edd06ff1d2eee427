import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer.adapt import heads, resize, swap_head, untie
from jaxtransfer.adapt.resize import ResizeError
from jaxtransfer.data.processor import processor
from jaxtransfer.models import ConfigFieldError
from jaxtransfer.models.interpolation import resize_matrix
from jaxtransfer.source import export, load
from jaxtransfer.tree import flatten
from jaxtransfer.tree.weights import Fixed
from tests import tiny, torch_reference
from tests.models import vision_zoo, zoo

KEY = jax.random.key(3)
RAW = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
    "initializer_range": 0.3,
}
DINO = {name: value for name, value in RAW.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
RESNET = {"embedding_size": 6, "hidden_sizes": (8,), "depths": (1,), "layer_type": "basic"}
CIFAR = {"depth": 8, "hidden_sizes": (4, 8, 16)}
MODELS = {"vit": RAW, "deit": RAW, "dinov2": DINO, "resnet": RESNET, "cifar-resnet": CIFAR}


def source(name, **raw):
    return vision_zoo.tiny(name, **MODELS[name] | raw)


def logits(src, pixels):
    return vision_zoo.outputs(src.model, src.params, {"pixel_values": pixels})["logits"]


def shared(before, after):
    """The paths of parameters that are the same array, and those that are not."""
    old, new = flatten(before.params), flatten(after.params)
    same = {path for path in new if old.get(path) is new[path]}
    return same, set(new) - same


# Positions


def test_images_are_prepared_at_the_new_size(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    fields = {"size": 14, "crop_size": 12, "do_center_crop": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    file.write_text(json.dumps(fields))
    src = source("vit")
    src = dataclasses.replace(src, assets={**src.assets, "files": {file.name: file}})
    grown = resize.patch_size(resize.resize_positions(src, 24), 8)
    how = processor(grown)
    assert (processor(src).size, how.size, how.resize, how.mean) == ((12, 12), (24, 24), (28, 28), (0.1,) * 3)
    assert processor(load(export(grown, tmp_path / "out"))) == how
    assert (export(src, tmp_path / "out") / file.name).read_text() == file.read_text()


@pytest.mark.torch
@pytest.mark.parametrize("name", ["vit", "deit"])
def test_positions_are_interpolated_as_transformers_does_it(name, tmp_path):
    import torch

    theirs, src = vision_zoo.from_torch(name, "imgcls")
    grown = resize.resize_positions(src, (35, 25))
    assert (
        shared(src, grown)[1] == {"embed/position"}
        and grown.params["embed"]["position"].shape[1] == 35 + (name == "deit") + 1
    )
    assert grown.lineage.operations == ("resize_positions(image_size=(35, 25))",) and src.lineage.operations == ()
    pixels = vision_zoo.images(2, 35, 25)
    with torch.no_grad():
        want = theirs(torch_reference.tensor(pixels), interpolate_pos_encoding=True).logits.numpy()
    zoo.assert_close(logits(grown, pixels), want)

    out = export(grown, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["image_size"] == [35, 25]
    again = type(theirs).from_pretrained(out)
    with torch.no_grad():
        zoo.assert_close(again(torch_reference.tensor(pixels)).logits.numpy(), want)
    assert tiny.same_bits(load(out).params, grown.params)


def test_positions_of_a_model_that_interpolates_itself():
    src = source("dinov2")
    pixels = vision_zoo.images(2, 20, 20)
    want = logits(src, pixels)
    grown = resize.resize_positions(src, 20)
    assert grown.model.config.grid == (5, 5)
    zoo.assert_close(logits(grown, pixels), want)
    with pytest.raises(ConfigFieldError, match="the positions of dinov2 must form a square"):
        resize.resize_positions(src, (12, 20))


def test_sizes_that_do_not_fit():
    with pytest.raises(
        ConfigFieldError, match=r"image_size=\(14, 14\): height and width must be multiples of patch_size"
    ):
        resize.resize_positions(source("vit"), 14)
    with pytest.raises(ConfigFieldError, match=r"image_size=\(12, 12\): .* multiples of patch_size=\(5, 5\)"):
        resize.patch_size(source("vit"), 5)
    with pytest.raises(ConfigFieldError, match=r"multiples of patch_size=\(0, 4\)"):
        resize.patch_size(source("vit"), (0, 4))
    with pytest.raises(ResizeError, match="a bert model has no positions of patches: nothing at embed/position"):
        resize.resize_positions(tiny.source(), 14)
    with pytest.raises(ResizeError, match="a resnet model has no projection of patches"):
        resize.patch_size(source("resnet"), 2)


# Patches


def test_an_enlarged_patch_is_projected_to_what_it_was():
    src = source("vit")
    pixels = vision_zoo.images(2, 12, 12)
    rows, columns = resize_matrix(4, 6, "bilinear"), resize_matrix(4, 7, "bilinear")
    patches = pixels.reshape(2, 3, 4, 3, 4, 3)
    enlarged = np.einsum("ai,bj,nxiyjc->nxaybc", rows, columns, patches).reshape(2, 18, 21, 3).astype(np.float32)
    grown = resize.patch_size(src, (6, 7), image_size=(18, 21))
    assert shared(src, grown)[1] == {"embed/patch/kernel"}
    assert grown.model.config.patch_size == (6, 7) and grown.model.config.image_size == (18, 21)
    assert grown.lineage.operations == ("patch_size(patch_size=(6, 7), image_size=(18, 21))",)
    zoo.assert_close(logits(grown, enlarged), logits(src, pixels))


def test_a_smaller_patch_is_the_best_fit_and_its_positions_follow():
    src = source("vit", image_size=16, patch_size=8)
    small = resize.patch_size(src, 4)
    assert shared(src, small)[1] == {"embed/patch/kernel", "embed/position"}
    assert small.model.config.grid == (4, 4) and small.params["embed"]["position"].shape == (1, 17, 12)
    assert np.isfinite(logits(small, vision_zoo.images(2, 16, 16))).all()
    # w' = argmin |B^T w' - w| over the whole patch: B of both axes at once, and no pseudo-inverse.
    both = np.kron(resize_matrix(8, 4, "bilinear"), resize_matrix(8, 4, "bilinear"))
    want, *_ = np.linalg.lstsq(both.T, np.asarray(src.params["embed"]["patch"]["kernel"]).reshape(64, -1), rcond=None)
    zoo.assert_close(small.params["embed"]["patch"]["kernel"], want.reshape(4, 4, 3, 12))


@pytest.mark.torch
def test_other_patches_and_channels_load_in_transformers(tmp_path):
    import torch

    theirs, src = vision_zoo.from_torch("dinov2", "imgcls")
    changed = resize.input_channels(resize.patch_size(src, 4), 1)
    out = export(changed, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["patch_size"], config["num_channels"], config["image_size"]) == (4, 1, 20)
    again, report = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = vision_zoo.images(2, 20, 20, 1)
    with torch.no_grad():
        zoo.assert_close(logits(changed, pixels), again(torch_reference.tensor(pixels)).logits.numpy())


# Channels


@pytest.mark.parametrize("name", MODELS)
def test_a_grey_image_gives_what_it_gave_thrice(name):
    src = source(name)
    size = 32 if "resnet" in name else 12
    grey = vision_zoo.images(2, size, size, 1)
    want = logits(src, np.repeat(grey, 3, axis=-1))
    one = resize.input_channels(src, 1)
    assert one.model.config.num_channels == 1 and len(shared(src, one)[1]) == 1
    zoo.assert_close(logits(one, grey), want)
    assert one.lineage.operations == ("input_channels(1)",)


def test_channels_are_shared_out_or_added_up():
    src = source("vit")
    kernel = np.asarray(src.params["embed"]["patch"]["kernel"])
    more, fewer, same = (resize.input_channels(src, n).params["embed"]["patch"]["kernel"] for n in (5, 2, 3))
    red, green, blue = (kernel[:, :, i] for i in range(3))
    zoo.assert_close(more, np.stack([red / 2, green / 2, blue, red / 2, green / 2], 2))
    zoo.assert_close(fewer, np.stack([red + blue, green], 2))
    assert np.array_equal(same, kernel)
    grey = vision_zoo.images(2, 12, 12, 1)
    zoo.assert_close(logits(resize.input_channels(src, 5), np.repeat(grey, 5, -1)), logits(src, np.repeat(grey, 3, -1)))


def test_channels_that_do_not_fit():
    with pytest.raises(ResizeError, match="a bert model has no one convolution over num_channels"):
        resize.input_channels(tiny.source(), 1)
    with pytest.raises(ResizeError, match="at least one channel, got 0"):
        resize.input_channels(source("vit"), 0)


def test_what_is_wrapped_is_refused():
    src = source("vit")
    kernel = Fixed(src.params["embed"]["patch"]["kernel"])
    embed = src.params["embed"] | {"patch": src.params["embed"]["patch"] | {"kernel": kernel}}
    wrapped = dataclasses.replace(src, params=src.params | {"embed": embed})
    for change in (lambda: resize.input_channels(wrapped, 1), lambda: resize.patch_size(wrapped, 2)):
        with pytest.raises(ResizeError, match="embed/patch/kernel is a Fixed, not an array: resize before attaching"):
            change()


# Vocabulary


def lm(**overrides):
    return swap_head(tiny.trunk(num_hidden_layers=1, **overrides), heads.masked_lm(), KEY)


def run(src):
    ids = np.random.default_rng(0).integers(0, 60, (2, 8)).astype(np.int32)
    return vision_zoo.outputs(src.model, src.params, {"input_ids": ids})["logits"]


@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_keep_their_logits_and_new_ones_are_the_mean(tied):
    src = lm() if tied else untie(lm())
    grown = resize.vocabulary(src, 70, KEY)
    follow = {"embed/word/embedding", "head/bias"} | (set() if tied else {"head/decoder/kernel"})
    assert shared(src, grown)[1] == follow and grown.model.config.vocab_size == 70
    assert grown.lineage.operations[-1] == "vocabulary(70)"
    before, after = run(src), run(grown)
    assert after.shape == (2, 8, 70)
    zoo.assert_close(after[..., :64], before)
    table, old = (np.asarray(s.params["embed"]["word"]["embedding"]) for s in (grown, src))
    assert np.array_equal(table[:64], old)
    noise = (table[64:] - old.mean(0)) / old.std(0)
    assert 0.5e-9 < np.mean(noise**2) < 2e-9 and len(np.unique(table[64:], axis=0)) == 6
    # A mean of embeddings is nobody's favourite: its logit lies among the others.
    assert np.all(after[..., 64:].max(-1) < before.max(-1))
    zoo.assert_close(run(resize.vocabulary(grown, 64, KEY, shrink=True)), before)


def test_plain_rows_are_drawn_as_the_model_draws_them():
    src = untie(lm())
    grown = resize.vocabulary(src, 264, KEY, mean=False)
    rows = np.asarray(grown.params["embed"]["word"]["embedding"])[64:]
    assert abs(rows.std() - 0.2) < 0.01 and abs(rows.mean()) < 0.02
    assert np.array_equal(grown.params["head"]["bias"][64:], np.zeros(200))
    assert tiny.same_bits(grown.params, resize.vocabulary(src, 264, KEY, mean=False).params)
    other = resize.vocabulary(src, 264, jax.random.key(4), mean=False).params["embed"]["word"]["embedding"]
    assert not np.array_equal(rows, other[64:])


def test_vocabularies_that_do_not_fit():
    src = lm()
    with pytest.raises(ResizeError, match="63 tokens are fewer than the model's 64; shrink=True drops the last rows"):
        resize.vocabulary(src, 63, KEY)
    with pytest.raises(ResizeError, match="pad_token_id=40 is not among 40 tokens"):
        resize.vocabulary(lm(pad_token_id=40), 40, KEY, shrink=True)
    with pytest.raises(ResizeError, match="a vit model has no word embedding"):
        resize.vocabulary(source("vit"), 100, KEY)
    assert shared(src, resize.vocabulary(src, 64, KEY))[1] == set()


def test_the_dtype_of_what_is_resized_stays():
    half = dataclasses.replace(lm(), params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm().params))
    grown = resize.vocabulary(half, 70, KEY)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grown.params)} == {"bfloat16"}


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_grown_encoder_loads_in_transformers(name, tmp_path):
    theirs = torch_reference.random_model(name, "mlm", 0)
    src = load(torch_reference.save(theirs, tmp_path / "theirs"))
    grown = resize.vocabulary(src, 107, KEY)
    out = export(grown, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = torch_reference.batch(name, 107, (2, 9), 0)
    zoo.assert_close(
        zoo.outputs(grown.model, grown.params, batch)["logits"], torch_reference.outputs(again, batch)["logits"]
    )
    assert tiny.same_bits(load(out).params, grown.params)


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_decoder_loads_in_transformers(tied, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    torch_reference.redraw(theirs, 0)
    src = load(torch_reference.save(theirs, tmp_path / "theirs"))
    grown = resize.vocabulary(src, 37, KEY)
    assert shared(src, grown)[1] == {"embed/word/embedding"} | (set() if tied else {"head/decoder/kernel"})
    out = export(grown, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = {"input_ids": np.arange(36, dtype=np.int32).reshape(2, 18)}
    got = vision_zoo.outputs(grown.model, grown.params, ids)["logits"]
    zoo.assert_close(got, torch_reference.outputs(again, ids)["logits"])
