"""Interchange with PEFT: our folders give the same logits there, theirs give the same logits here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtransfer import export, heads, load, swap_head
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import subtrees
from jaxtransfer.models import apply
from jaxtransfer.source.peft import PeftError, load_adapter, write_adapter
from jaxtransfer.source.peft_config import EVERYWHERE, READ, SILENT, read_config
from jaxtransfer.source.safetensors import TensorFile
from jaxtransfer.source.writer import write
from jaxtransfer.tree.weights import is_weight
from jaxtransfer.types import Lineage, Source
from tests import tiny
from tests.models import decoder_zoo, zoo

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT's own call
]
ATTENTION, MLP = r"blocks/\d+/attention/(query|value)/kernel", r"blocks/\d+/mlp/down/kernel"
OURS = {
    "lora": [(ATTENTION, at.lora(2, alpha=5)), (MLP, at.lora(3)), ("embed/word/embedding", at.lora(2))],
    "dora": [(ATTENTION, at.dora(2, alpha=3))],
    "ia3": [(ATTENTION, at.ia3()), (MLP, at.ia3("input"))],
    "vera": [(ATTENTION, at.vera(5)), (MLP, at.vera(5))],
    "prompt": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base on disk that both sides load: its folder, and ours as loaded."""
    folder = export(tiny.source(), tmp_path_factory.mktemp("base") / "model")
    return folder, load(folder)


def moved(source):
    """The adapters and the head as if trained."""

    def move(node, seed):
        keys = jax.random.split(jax.random.key(seed), len(node.trainable))
        return dataclasses.replace(
            node,
            **{
                part: getattr(node, part) + 0.3 * jax.random.normal(key, getattr(node, part).shape)
                for part, key in zip(node.trainable, keys, strict=True)
            },
        )

    if "prompt" in source.params["embed"]:
        source = dataclasses.replace(source, params=jax.tree.map(lambda x: x, source.params))
        source.params["embed"]["prompt"]["embedding"] *= 3
    leaves, structure = jax.tree.flatten(source.params, is_leaf=is_weight)
    params = jax.tree.unflatten(structure, [move(x, i) if is_weight(x) else x for i, x in enumerate(leaves)])
    head = jax.tree.map(lambda x: x + 0.1, params["head"])
    return dataclasses.replace(source, params={**params, "head": head})


def theirs(folder, adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def their_logits(model):
    import torch

    batch = tiny.batch()
    with torch.no_grad():
        ids, mask = (torch.tensor(batch[name]) for name in ("input_ids", "attention_mask"))
        return model(input_ids=ids.long(), attention_mask=mask.long()).logits.numpy()


def our_logits(source):
    return np.asarray(jax.jit(lambda p: apply(source.model, p, tiny.batch())["logits"])(source.params))


def made(name, source):
    key = jax.random.key(0)
    return subtrees.prompt_tuning(source, key, length=4) if name == "prompt" else at.attach(source, OURS[name], key)


@pytest.mark.parametrize("name", OURS)
def test_ours_loads_there_and_comes_back(name, base, tmp_path):
    folder, source = base
    tuned = moved(made(name, source))
    (tmp_path / "a").mkdir()
    write_adapter(tuned, tmp_path / "a")
    want = our_logits(tuned)
    assert np.abs(want - our_logits(source)).max() > 1e-2
    zoo.assert_close(their_logits(theirs(folder, tmp_path / "a")), want)
    again = load_adapter(source, tmp_path / "a")
    np.testing.assert_allclose(our_logits(again), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"ia3": True},
        {"vera": True},
        {"vera": True, "save_projection": False, "projection_prng_key": 7},
        {"prompt": True},
    ],
    ids=["lora", "rslora", "dora", "ia3", "vera", "vera-drawn-again", "prompt"],
)
@pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A:UserWarning")
def test_theirs_loads_here(options, base, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    folder, source = base
    torch.manual_seed(0)
    modules = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}
    kind, options = next(iter(options), None), dict(options)
    if options.pop("vera", False):
        config = peft.VeraConfig(r=5, **modules, **options)
    elif kind == "prompt":
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    elif options.get("ia3"):
        config = peft.IA3Config(feedforward_modules=["output.dense"], **modules)
    else:
        config = peft.LoraConfig(r=3, rank_pattern={"layer.1.attention.self.query": 2}, **modules, **options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    zoo.assert_close(our_logits(load_adapter(source, tmp_path / "theirs")), their_logits(model))


def test_what_is_not_supported_is_refused_by_name(base, tmp_path):
    _, source = base
    tuned = moved(at.attach(source, OURS["lora"], jax.random.key(0)))
    folder = export(tuned, tmp_path / "a", format="peft")
    raw = json.loads((folder / "adapter_config.json").read_text())

    def refuse(change, message, base=source):
        (folder / "adapter_config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(PeftError, match=message):
            load_adapter(base, folder)

    refuse({"peft_type": "OFT"}, "peft_type 'OFT' is not supported, only LORA, IA3, VERA, PROMPT_TUNING")
    refuse({"layer_replication": [[0, 1]]}, "field layer_replication=.* is not supported")
    refuse({"bias": "all"}, "field bias='all'")
    other = dataclasses.replace(source, lineage=dataclasses.replace(source.lineage, digest="0" * 64))
    refuse({}, "is an adapter for the base with digest", other)
    (folder / "jaxtransfer.json").unlink()
    refuse({}, "tensors have no place", load(base[0], head=None))
    wide = tiny.source(hidden_size=32)
    refuse({}, "is for another base; this weight is|the folder's tensor is .* the model's is", wide)
    twice = load_adapter(source, folder)
    refuse({}, "has an adapter called 'default' already", twice)


INFINITE = float("inf")


def put_fields(folder, fields):
    """Writes a configuration; JSON has no infinity, but numbers that are too large."""
    (folder / "adapter_config.json").write_text(json.dumps(fields).replace("Infinity", "1e999"))


def read(folder, **fields):
    """What `read_config` makes of a configuration."""
    put_fields(folder, fields)
    (folder / "adapter_model.safetensors").touch()
    return read_config(folder)


CONFIGS = {"LORA": "LoraConfig", "IA3": "IA3Config", "VERA": "VeraConfig", "PROMPT_TUNING": "PromptTuningConfig"}
UNSAVED = {"runtime_config"}
"""Fields that PEFT's configurations have and its files have not."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_peft_is_read_or_passed_over_for_a_reason_or_refused_by_name(kind, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(getattr(peft, CONFIGS[kind]))} - UNSAVED
    own, everywhere = (
        {n for names, why in d.items() if why for n in names.split()} for d in (SILENT[kind], EVERYWHERE)
    )
    assert fields >= READ[kind].keys() | own
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} >= everywhere
    assert not (READ[kind].keys() & own or (READ[kind].keys() | own) & everywhere)
    for name in sorted(fields - READ[kind].keys() - own - everywhere):
        assert read(tmp_path, peft_type=kind, **{name: None})
        for value in (True, "all", ["head"], {"rank": 4}, 3):
            with pytest.raises(PeftError, match=rf"field {name}=.* of a {kind} adapter is not supported"):
                read(tmp_path, peft_type=kind, **{name: value})
    with pytest.raises(PeftError, match="field of_tomorrow=1 of a"):
        read(tmp_path, peft_type=kind, of_tomorrow=1)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("LORA", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' of a LORA adapter is not supported"),
        ("LORA", {"r": "8"}, "field r='8' of a LORA adapter: expected int"),
        ("LORA", {"lora_alpha": None}, "field lora_alpha=None of a LORA adapter: expected int or float"),
        ("LORA", {"lora_alpha": True}, "field lora_alpha=True"),
        ("LORA", {"lora_alpha": INFINITE}, "field lora_alpha=inf of a LORA adapter: expected a finite number"),
        ("LORA", {"lora_alpha": 10**400}, "field lora_alpha=10* of a LORA adapter: expected a finite number"),
        ("LORA", {"r": 0}, "field r=0 of a LORA adapter: expected a rank of 1 or more"),
        ("LORA", {"lora_dropout": 1.5}, r"field lora_dropout=1.5 of a LORA adapter: expected a share in \[0, 1\)"),
        ("LORA", {"use_dora": "yes"}, "field use_dora='yes' of a LORA adapter: expected bool or null"),
        ("LORA", {"rank_pattern": [4]}, r"field rank_pattern=\[4\] of a LORA adapter: expected dict or null"),
        ("IA3", {"feedforward_modules": 3}, "feedforward_modules=3 of a IA3 adapter: expected str or list or null"),
        ("VERA", {"projection_prng_key": "0"}, "field projection_prng_key='0' of a VERA adapter: expected int"),
        ("VERA", {"vera_dropout": -0.1}, "field vera_dropout=-0.1"),
        ("PROMPT_TUNING", {"num_virtual_tokens": "4"}, "field num_virtual_tokens='4'"),
        ("PROMPT_TUNING", {"num_transformer_submodules": 2}, "field num_transformer_submodules=2"),
        (["LORA"], {}, r"peft_type \['LORA'\] is not supported, only LORA, IA3"),
        ("PREFIX_TUNING", {}, "peft_type 'PREFIX_TUNING' is not supported .PEFT's prefixes move the tokens' positions"),
    ],
)
def test_a_field_that_is_read_must_be_what_it_can_be(kind, fields, message, tmp_path):
    with pytest.raises(PeftError, match=message):
        read(tmp_path, peft_type=kind, **fields)


def test_every_field_of_lora_that_is_read_counts(base, tmp_path):
    _, source = base
    tuned = at.attach(source, [(ATTENTION, at.lora(2, alpha=5)), (MLP, at.lora(3))], jax.random.key(0))
    write_adapter(tuned, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())

    def loaded(**change):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, **change}))
        return load_adapter(source, tmp_path).params["blocks"]["0"]["attention"]["query"]["kernel"]

    assert float(loaded().scale) == 2.5 and loaded().rate == 0.0
    assert float(loaded(lora_alpha=8, alpha_pattern={}).scale) == 4.0
    assert float(loaded(alpha_pattern={"query": 3}).scale) == 1.5
    assert float(loaded(use_rslora=True, lora_alpha=3).scale) == pytest.approx(3 / 2**0.5)
    assert loaded(lora_dropout=0.25).rate == 0.25
    for change, message in (
        ({"r": 4}, "query/kernel: its tensors are of rank 2, the configuration says 4"),
        ({"rank_pattern": {}}, "down/kernel: its tensors are of rank 3, the configuration says 2"),
        ({"rank_pattern": {"down": "3"}}, "its tensors are of rank 3, the configuration says 2"),
        ({"rank_pattern": {".*": "3"}}, "rank_pattern or alpha_pattern says '3': expected a finite number"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"use_dora": True}, "query/kernel: the folder has .* of its adapter, but no lora_magnitude_vector"),
    ):
        with pytest.raises(PeftError, match=message):
            loaded(**change)


@pytest.fixture
def change(tmp_path):
    """Writes the adapter of a source, with other fields and tensors."""

    def change(source, fields=(), tensors=None):
        if not (tmp_path / "adapter_config.json").exists():
            write_adapter(source, tmp_path)
            raw = json.loads((tmp_path / "adapter_config.json").read_text())
            file = TensorFile(tmp_path / "adapter_model.safetensors")
            change.raw, change.tensors = raw, {name: np.array(file.read(name)) for name in file.tensors}
        put_fields(tmp_path, {**change.raw, **dict(fields)})
        held = change.tensors if tensors is None else tensors(change.tensors)
        write(tmp_path / "adapter_model.safetensors", held, {"format": "pt"})
        return tmp_path

    return change


def without(part):
    return lambda tensors: {name: array for name, array in tensors.items() if part not in name}


@pytest.mark.parametrize("name", ["lora", "ia3", "vera"])
def test_what_the_configuration_names_and_the_folder_lacks_is_refused(name, base, change):
    _, source = base
    tuned = moved(at.attach(source, OURS[name][:2], jax.random.key(0)))
    few = ["query", "value", "output.dense"]
    names = "target_modules names bert.encoder.layer.1.attention.self.value, but .* only of bert"
    for fields, tensors, message in (
        ({}, without("layer.1.attention.self.value"), names),
        ({"target_modules": few}, without("self.value"), "target_modules names value, but"),
        ({"target_modules": ["key", "query"]}, None, "target_modules names key, but"),
        ({"target_modules": ".*query"}, without("layer"), f"='.*query', .* holds no part of a {name.upper()} adapter"),
        ({}, without("classifier"), r"modules_to_save=\['classifier'\], but .* holds no tensor of classifier"),
        ({"modules_to_save": ["pooler", "classifier"]}, None, "holds no tensor of pooler"),
        ({"modules_to_save": ["score"]}, without("classifier"), "holds no tensor of score"),
    ):
        with pytest.raises(PeftError, match=message):
            load_adapter(source, change(tuned, fields, tensors))
    # An expression, what PEFT lists for every classifier, and names that nothing here has or that are taken out again.
    for fields in (
        {"target_modules": ".*"},
        {"modules_to_save": ["classifier", "score"]},
        {"target_modules": [*few, "q_proj"]},
        {"target_modules": ["key", "query"], "exclude_modules": "key"},
    ):
        load_adapter(source, change(tuned, fields))


def test_an_adapter_stands_under_its_own_labels(base, tmp_path):
    _, source = base
    key = jax.random.key(0)
    own, turned, numbered = (
        swap_head(source, heads.classifier(labels), key) for labels in (["no", "yes"], ["yes", "no"], 2)
    )
    folder = export(moved(at.attach(own, OURS["dora"], key)), tmp_path / "a", format="peft")
    for other, message in (
        (turned, r"trained under a sequence-class.* of labels \['no', 'yes'\], this model ends in .*\['yes', 'no'\]"),
        (swap_head(source, heads.span(), key), "this model ends in a question-answering head: swap_head to the former"),
    ):
        with pytest.raises(PeftError, match=message):
            load_adapter(other, folder)
    for same in (own, numbered):
        load_adapter(same, folder)


def test_tensors_that_the_method_does_not_read_or_cannot_are_refused_by_name(base, change):
    _, source = base
    tuned = moved(at.attach(source, OURS["dora"], jax.random.key(0)))
    stem = "base_model.model.bert.encoder.layer.0.attention.self.query."
    magnitude = f"{stem}lora_magnitude_vector"

    def put(name, make):
        return lambda tensors: {**tensors, name: make(tensors.get(name))}

    integers = r"query\.lora_B\.weight is int32, expected floats"
    for fields, tensors, message in (
        ({}, put(magnitude, lambda m: m[:1]), r"query/kernel: lora_magnitude_vector has 1 magnitudes .*\(16, 16\)"),
        ({"use_dora": False}, None, "a LORA adapter without use_dora does not read lora_magnitude_vector"),
        ({}, put(f"{stem}ia3_l", lambda _: np.ones((16, 1), np.float32)), "a LORA adapter does not read ia3_l"),
        ({}, put(f"{stem}lora_B.weight", lambda b: b * np.nan), r"query\.lora_B\.weight holds numbers that are not"),
        ({}, put(f"{stem}lora_B.weight", lambda b: b.astype(np.int32)), integers),
        ({"alpha_pattern": {"query": INFINITE}}, None, "rank_pattern or alpha_pattern says inf: expected a finite"),
    ):
        with pytest.raises(PeftError, match=message):
            load_adapter(source, change(tuned, fields, tensors))
    half = load_adapter(source, change(tuned, {}, put(magnitude, lambda m: m.astype(np.float16))))
    assert half.params["blocks"]["0"]["attention"]["query"]["kernel"].magnitude.dtype == jnp.float32


def test_a_dora_on_an_embedding_is_refused_when_it_is_read(base, change):
    _, source = base
    words = at.attach(source, [("embed/word/embedding", at.lora(2))], jax.random.key(0))
    assert "a" in vars(load_adapter(source, change(words)).params["embed"]["word"]["embedding"])
    with pytest.raises(PeftError, match="embed/word/embedding: DoRA is not defined on embeddings here"):
        load_adapter(source, change(words, {"use_dora": True}))


def test_adapters_that_peft_has_no_form_for_are_refused(base, tmp_path):
    _, source = base
    with pytest.raises(PeftError, match="there are no adapters"):
        write_adapter(source, tmp_path)
    mixed = at.attach(source, [(ATTENTION, at.lora(2)), (MLP, at.dora(2))], jax.random.key(0))
    with pytest.raises(PeftError, match=r"these are \['DoRA', 'LoRA'\]"):
        write_adapter(mixed, tmp_path)
    once = at.attach(source, [(MLP, at.lora(2))], jax.random.key(0))
    nested = at.attach(once, [(MLP, at.lora(2))], jax.random.key(1), name="second")
    with pytest.raises(PeftError, match="on top of one another"):
        write_adapter(nested, tmp_path)
    assert jnp.array_equal(our_logits(nested), our_logits(source))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_a_prompt_of_a_decoder_gives_the_logits_of_peft(name, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model, ours, params = decoder_zoo.from_torch(name)
    source = Source(ours, params, Lineage("memory", ""))
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    # Its windows count the padding between prompt and tokens, and what a row says depends on its batch; ours do not.
    batch = decoder_zoo.batch(padding="right" if ours.config.windows else "left")
    with torch.no_grad():
        want = theirs(**{key: torch.from_numpy(value).long() for key, value in batch.items()}).logits.numpy()
    prompted = load_adapter(source, tmp_path)
    got = np.asarray(jax.jit(lambda p: apply(ours, p, batch)["logits"])(prompted.params))
    real = batch["attention_mask"].astype(bool)
    zoo.assert_close(got[real], want[:, 4:][real])
    (tmp_path / "again").mkdir()
    write_adapter(prompted, tmp_path / "again")
    again = load_adapter(source, tmp_path / "again")
    assert tiny.same_bits(again.params, prompted.params)


def test_what_cannot_stand_in_a_folder_or_on_a_model_is_refused(base, tmp_path):
    _, source = base
    key = jax.random.key(0)
    prompted = subtrees.prompt_tuning(source, key, length=4)
    write_adapter(prompted, tmp_path)
    with pytest.raises(PeftError, match="is a prompt, and this bert has a prompt already"):
        load_adapter(prompted, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"num_virtual_tokens": 5}, r"prompt_embeddings is \(4, 16\), expected \(5, 16\)"),
        ({"num_transformer_submodules": 2}, "field num_transformer_submodules=2"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(PeftError, match=message):
            load_adapter(source, tmp_path)
    for other, message in (
        (subtrees.prefix_tuning(source, key, length=2), "PEFT has no form of what stands at blocks/0/prefix"),
        (subtrees.prefix_tuning(prompted, key, length=2), r"one kind; these are \['prefix', 'prompt'\]"),
        (at.attach(prompted, OURS["dora"], key), r"one kind; these are \['DoRA', 'prompt'\]"),
        (subtrees.prompt_tuning(tiny.trunk(), key, length=2), "under the tasks .*, this model has no head"),
    ):
        with pytest.raises(PeftError, match=message):
            write_adapter(other, tmp_path)
    vera = at.attach(source, OURS["vera"], key)
    (tmp_path / "vera").mkdir()
    write_adapter(vera, tmp_path / "vera")
    loaded = load_adapter(source, tmp_path / "vera")
    assert loaded.lineage.fingerprints.keys() >= {"blocks/0/attention/query/kernel@base"}
    with pytest.raises(PeftError, match="has an adapter called 'default' already"):
        load_adapter(loaded, tmp_path / "vera")
