"""Interchange with PEFT by family: what was trained beside adapters, tied embeddings, and what modules are called."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxtransfer import export, heads, load, swap_head, untie
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import quantize, subtrees
from jaxtransfer.models import apply
from jaxtransfer.source.peft import PeftError, load_adapter, write_adapter
from jaxtransfer.source.safetensors import TensorFile
from jaxtransfer.source.writer import write
from jaxtransfer.tree.paths import flatten, unflatten
from jaxtransfer.tree.weights import is_weight
from tests import tiny, torch_reference
from tests.models import decoder_zoo, vision_zoo, zoo

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT's own call
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`.*:UserWarning"),
]
AUTO = {
    "clm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "seqcls": "AutoModelForSequenceClassification",
    "imgcls": "AutoModelForImageClassification",
}
QUERIES = [(r"blocks/\d+/attention/(query|qkv)/kernel", at.lora(2))]
WORDS = "embed/word/embedding"
IDS = np.random.default_rng(0).integers(3, 60, (3, 7)).astype(np.int32)
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
IMAGES = {"pixel_values": vision_zoo.images(3, 20, 20)}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A random torch model of a family as a folder, and ours as loaded from it."""
    made = {}

    def on_disk(name, head, **overrides):
        key = (name, head, *overrides)
        if key not in made:
            make = decoder_zoo if name in decoder_zoo.FAMILIES else torch_reference
            folder = tmp_path_factory.mktemp(name)
            make.random_model(name, head, 0, **overrides).save_pretrained(folder)
            made[key] = folder, load(folder)
        return made[key]

    return on_disk


def torch_model(folder, head):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, AUTO[head]).from_pretrained(folder, attn_implementation="eager")


def theirs(folder, head, adapter, **options):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(torch_model(folder, head), adapter, **options).eval()


def their_logits(model):
    import torch

    images = torch.tensor(IMAGES["pixel_values"].transpose(0, 3, 1, 2).copy())
    text = {name: torch.tensor(value).long() for name, value in TEXT.items()}
    with torch.no_grad():
        batch = {"pixel_values": images} if model.base_model.main_input_name == "pixel_values" else text
        return model(**batch).logits.numpy()


def our_logits(source):
    batch = IMAGES if "patch" in source.params["embed"] else TEXT
    return np.asarray(jax.jit(lambda p: apply(source.model, p, batch)["logits"])(source.params))


def moved(source, *plain):
    """The adapters, and the plain leaves named, as if trained."""

    def move(path, node):
        key = jax.random.key(len(path))
        if not is_weight(node):
            return node + 0.1 * jax.random.normal(key, node.shape)
        parts = {part: getattr(node, part) for part in node.trainable}
        return dataclasses.replace(node, **{p: x + 0.3 * jax.random.normal(key, x.shape) for p, x in parts.items()})

    flat = flatten(source.params, is_leaf=is_weight)
    assert flat.keys() >= set(plain)
    chosen = {path for path, node in flat.items() if hasattr(node, "trainable")} | set(plain)
    return dataclasses.replace(source, params=unflatten({p: move(p, x) if p in chosen else x for p, x in flat.items()}))


def written(source, folder):
    """The folder of a source's adapters, and its configuration."""
    folder.mkdir()
    write_adapter(source, folder)
    return folder, json.loads((folder / "adapter_config.json").read_text())


def agree(base, source, folder, adapter, head, **options):
    """PEFT's model has our logits, and ours comes back bit for bit."""
    model = theirs(folder, head, adapter, **options)
    got, want = their_logits(model), our_logits(source)
    zoo.assert_close(got[:, -want.shape[1] :] if want.ndim == 3 else got, want)
    assert tiny.same_bits(load_adapter(base, adapter).params, source.params)
    return model


def test_an_adapter_stands_on_the_weights_that_were_loaded(tmp_path):
    key = jax.random.key(0)
    base = load(export(tiny.source(), tmp_path / "base"))
    up = [(r"blocks/\d+/mlp/up/kernel", at.lora(2))]
    merged = at.merge(moved(at.attach(base, up, key)))
    kept = at.merge(moved(at.attach(base, QUERIES, key)), keep=True)
    fresh = swap_head(base, heads.classifier(2), key)
    packed = [(r"blocks/\d+/mlp/up/kernel", "int8")]
    under = (
        "the weight under the adapter is a fresh, trained or merged one, .* on that of base: export the merged model"
    )
    for number, (other, rules, names) in enumerate(
        (
            (merged, up, "blocks/0-3/mlp/up/kernel"),
            (quantize(merged, packed), up, "blocks/0-3/mlp/up/kernel"),
            (fresh, [("head/out/kernel", at.lora(2)), *up], "head/out/kernel"),
            (kept, up, "blocks/0-3/attention/query/kernel"),
        )
    ):
        with pytest.raises(PeftError, match=f"export: {names}: {under}"):
            written(at.attach(other, rules, key), tmp_path / str(number))
    for number, other in enumerate((quantize(base, packed), load(tmp_path / "base", quantize=packed))):
        folder, _ = written(tuned := moved(at.attach(other, up, key)), tmp_path / f"packed{number}")
        assert tiny.same_bits(load_adapter(other, folder).params, tuned.params)


def test_an_untied_decoder_is_adapted_on_the_embedding_that_it_was(on_disk, tmp_path):
    folder, base = on_disk("gemma2", "clm")
    loose = untie(base)
    tuned = moved(at.attach(loose, [("head/decoder/kernel", at.lora(2)), *QUERIES], jax.random.key(0)))
    adapter, _ = written(tuned, tmp_path / "a")
    agree(loose, tuned, folder, adapter, "clm")
    other = at.attach(moved(loose, "head/decoder/kernel"), [("head/decoder/kernel", at.lora(2))], jax.random.key(0))
    with pytest.raises(PeftError, match="export: head/decoder/kernel: the weight under the adapter"):
        written(other, tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "head", "adapter", "whole", "tied"),
    [
        ("gemma2", "clm", at.lora(2), ["lm_head", "model.embed_tokens"], True),
        ("gemma2", "clm", at.ia3(), ["lm_head", "model.embed_tokens"], False),
        ("gpt2", "clm", at.lora(2), ["lm_head", "transformer.wte"], True),
        ("bert", "mlm", at.lora(2), ["bert.embeddings.word_embeddings", "cls.predictions.decoder"], False),
    ],
    ids=["gemma2", "gemma2-ia3", "gpt2", "bert"],
)
def test_a_tied_embedding_trained_beside_adapters_is_written_for_all_that_use_it(
    name, head, adapter, whole, tied, on_disk, tmp_path
):
    folder, base = on_disk(name, head)
    tuned = moved(at.attach(base, [(QUERIES[0][0], adapter)], jax.random.key(0)), WORDS)
    out, config = written(tuned, tmp_path / "a")
    assert config["modules_to_save"] == whole
    model = agree(base, tuned, folder, out, head, is_trainable=True)
    embedding, decoder = (get().weight for get in (model.get_input_embeddings, model.get_output_embeddings))
    assert (embedding is decoder) == config.get("ensure_weight_tying", False) == tied


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gemma2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
        ("gemma2", {"modules_to_save": ["embed_tokens"]}, "holds a model.embed_tokens.weight, and here .* are one"),
        ("gemma2", {"modules_to_save": ["lm_head"]}, "holds a lm_head.weight, and here model.embed_tokens.weight and"),
        ("gemma2", {"target_modules": ["q_proj", "lm_head"]}, "lm_head has no weight of its own here, untie"),
        (
            "gemma2",
            {"target_modules": r"model\..*(q_proj|embed_tokens)", "ensure_weight_tying": True},
            "adapts model.embed_tokens alone, and here stage head reads embed/word/embedding as well: untie",
        ),
        (
            "gpt2",
            {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True, "fan_in_fan_out": True},
            "adapts transformer.wte alone, and here stage head reads embed/word/embedding as well: untie",
        ),
    ],
    ids=["one", "embedding-alone", "head-alone", "head-adapted", "expression", "gpt2"],
)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_what_peft_keeps_apart_is_no_tied_model(name, options, message, on_disk, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, base = on_disk(name, "clm")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch_model(folder, "clm"), peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})
    )
    with torch.no_grad():
        for parameter in (p for p in model.eval().parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    if message is not None:
        with pytest.raises(PeftError, match=message):
            load_adapter(base, tmp_path / "a")
        base = untie(base)
    zoo.assert_close(our_logits(load_adapter(base, tmp_path / "a")), their_logits(model))


@pytest.mark.parametrize(
    ("name", "head", "trained", "whole"),
    [
        ("bert", "seqcls", (), None),
        ("roberta", "seqcls", (), None),
        ("distilbert", "seqcls", (), None),
        ("distilbert", "seqcls", ("head/out/bias",), ["classifier", "pre_classifier"]),
        ("bert", "seqcls", ("blocks/0/mlp/norm/bias",), ["bert.encoder.layer.0.output.LayerNorm"]),
        ("bert", "mlm", ("head/bias",), ["cls"]),
        ("roberta", "mlm", ("head/bias", WORDS), ["lm_head", "roberta.embeddings.word_embeddings"]),
    ],
)
def test_the_modules_in_a_folder_are_whole(name, head, trained, whole, on_disk, tmp_path):
    folder, base = on_disk(name, head)
    tuned = moved(at.attach(base, QUERIES, jax.random.key(0)), *trained)
    adapter, config = written(tuned, tmp_path / "a")
    task = "SEQ_CLS" if whole and "classifier" in whole else None
    assert (config["modules_to_save"], config["task_type"]) == (whole, task)
    agree(base, tuned, folder, adapter, head)


def test_a_prompt_under_an_untrained_classifier_goes_with_it(on_disk, tmp_path):
    folder, base = on_disk("bert", "seqcls")
    prompted = subtrees.prompt_tuning(base, jax.random.key(0), length=4)
    adapter, config = written(prompted, tmp_path / "a")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    agree(base, prompted, folder, adapter, "seqcls")
    with pytest.raises(
        PeftError, match=f"export: {WORDS} was trained beside the prompt, under which PEFT looks tokens"
    ):
        written(moved(prompted, WORDS), tmp_path / "b")


def test_a_module_that_is_in_part_adapted_or_packed_is_not_kept_whole(on_disk, tmp_path):
    _, base = on_disk("bert", "mlm")
    dense = "head/dense/kernel"
    adapted = at.attach(base, [(dense, at.lora(2))], jax.random.key(0))
    packed = at.attach(quantize(base, [(dense, "int8")]), QUERIES, jax.random.key(0))
    for number, (source, message) in enumerate(
        (
            (
                adapted,
                "head/bias was trained beside the adapter on head/dense/kernel; PEFT has a module adapted or whole",
            ),
            (packed, "PEFT keeps head/dense/kernel with head/bias, and it is a Int8 here: leave it as an array"),
        )
    ):
        with pytest.raises(PeftError, match=f"export: {message}"):
            written(moved(source, "head/bias"), tmp_path / str(number))


LINEAR = [(r"blocks/\d+/(attention|mlp)/(query|key|value|output|up|down)/kernel", at.lora(2))]
FILES = {
    "vit": (
        (r"layers\.(\d)\.", r"encoder.layer.\1."), (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
    ),
    "dinov2": ((r"attention\.o_proj", "attention.output.dense"),),
}  # fmt: skip
"""Names in memory, and in files."""
ATTENTION = tuple(
    (rf"\.{k}_proj", f".attention.{name}") for k, name in zip("qkv", ("query", "key", "value"), strict=True)
)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_a_vision_transformer_goes_by_the_names_in_memory_and_comes_by_those_of_files_too(name, on_disk, tmp_path):
    folder, base = on_disk(name, "imgcls")
    plain = ("blocks/1/attention/norm/scale", "head/out/bias")
    tuned = moved(at.attach(base, LINEAR, jax.random.key(0)), *plain)
    adapter, config = written(tuned, tmp_path / "a")
    model = agree(base, tuned, folder, adapter, "imgcls")
    assert len(config["target_modules"]) == len(model.targeted_module_names) == 18

    def renamed(text):
        for memory, file in (*ATTENTION, *FILES["vit" if name == "deit" else name]):
            text = re.sub(memory, file, text)
        return text

    file = TensorFile(adapter / "adapter_model.safetensors")
    tensors = {renamed(key): np.array(file.read(key)) for key in file.tensors}
    assert len(tensors.keys() - file.tensors.keys()) > 18
    write(adapter / "adapter_model.safetensors", tensors, {"format": "pt"})
    config["target_modules"] = [renamed(module) for module in config["target_modules"]]
    config["modules_to_save"] = [renamed(module) for module in config["modules_to_save"]]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert tiny.same_bits(load_adapter(base, adapter).params, tuned.params)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_an_adapter_of_a_vision_transformer_in_peft_loads_here(name, on_disk, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    folder, base = on_disk(name, "imgcls")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "o_proj", "fc2"], rank_pattern={"q_proj": 2}, modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(torch_model(folder, "imgcls"), config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    zoo.assert_close(our_logits(load_adapter(base, tmp_path / "a")), their_logits(model))


def test_a_kernel_that_is_two_modules_in_memory_is_not_adapted(on_disk, tmp_path):
    folder, base = on_disk("dinov2", "imgcls", use_swiglu_ffn=True)
    key = jax.random.key(0)
    with pytest.raises(
        PeftError, match="export: blocks/0/mlp/up/kernel is one array here, and gate_proj and up_proj in"
    ):
        written(at.attach(base, LINEAR, key), tmp_path / "a")
    tuned = moved(at.attach(base, [(r"blocks/\d+/(attention/query|mlp/down)/kernel", at.lora(2))], key))
    adapter, _ = written(tuned, tmp_path / "b")
    agree(base, tuned, folder, adapter, "imgcls")
