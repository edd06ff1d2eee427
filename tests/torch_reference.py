"""Tiny random torch models: what the parity tests compare against.

Importing this module needs numpy and pytest only; a function that needs torch or transformers skips the
calling test where they are absent. Names are those that `save_pretrained` writes, which is the contract, and
not those in memory. The same definitions make the golden files (`goldens/make_goldens.py`).
"""

import contextlib
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")
HEADS = ("model", "seqcls", "tokencls", "qa", "mlm")  # bert has "pretraining" besides

_AUTO_CLASSES = {
    "model": "AutoModel",
    "seqcls": "AutoModelForSequenceClassification",
    "tokencls": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "mlm": "AutoModelForMaskedLM",
    "pretraining": "AutoModelForPreTraining",
    "imgcls": "AutoModelForImageClassification",
}
_CLASSES = {  # what no AutoModel makes from a bare configuration
    ("deit", "imgcls"): "DeiTForImageClassification",
    ("deit", "teacher"): "DeiTForImageClassificationWithTeacher",
}
_CONFIG_CLASSES = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "xlm-roberta": "XLMRobertaConfig",
    "distilbert": "DistilBertConfig",
    "resnet": "ResNetConfig",
    "vit": "ViTConfig",
    "deit": "DeiTConfig",
    "dinov2": "Dinov2Config",
}
_VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 20, "patch_size": 5}
_VISION = {
    "resnet": {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [2, 3], "layer_type": "basic"},
    "vit": _VIT | {"intermediate_size": 37},
    "deit": _VIT | {"intermediate_size": 37},
    "dinov2": _VIT | {"mlp_ratio": 3},
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_LABELS = ("negative", "neutral", "positive")
_OUTPUTS = (
    "last_hidden_state",
    "pooler_output",
    "logits",
    "start_logits",
    "end_logits",
    "prediction_logits",
    "seq_relationship_logits",
    "cls_logits",
    "distillation_logits",
)


def combinations():
    """Every (family, head) pair that the golden files cover."""
    return [(family, head) for family in FAMILIES for head in HEADS] + [("bert", "pretraining")]


def tiny_config(family, head, **overrides):
    """A small configuration with odd sizes; `overrides` use the family's own names of the fields.

    Three named labels, except for question answering: transformers splits those logits into start and end, so
    exactly two labels work. All else (dropouts, LayerNorm's epsilon, gelu) is the default of the family's
    configuration class. (Published RoBERTa and XLM-RoBERTa files say `layer_norm_eps=1e-5`, the class 1e-12.)
    """
    transformers = pytest.importorskip("transformers")
    if family in _VISION:
        fields = dict(_VISION[family])
    elif family == "distilbert":
        fields = {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 37}
    else:
        fields = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
        fields |= {"intermediate_size": 37, "type_vocab_size": 2 if family == "bert" else 1}
    if family not in _VISION:
        fields |= {"vocab_size": 101, "max_position_embeddings": 41}
    if head != "qa" and "num_labels" not in overrides:
        fields["id2label"] = dict(enumerate(_LABELS))
        fields["label2id"] = {name: index for index, name in enumerate(_LABELS)}
    return getattr(transformers, _CONFIG_CLASSES[family])(**(fields | overrides))


def random_model(family, head, seed, dtype=None, **overrides):
    """A torch model in evaluation mode, eager attention, with every parameter drawn again (`redraw`).

    `dtype` is a torch dtype, `torch.float32` if it is not given.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_config(family, head, **overrides)
    how = {"attn_implementation": "eager", "dtype": dtype or torch.float32}
    if (family, head) in _CLASSES:
        model = getattr(transformers, _CLASSES[family, head])._from_config(config, **how)
    else:
        model = getattr(transformers, _AUTO_CLASSES[head]).from_config(config, **how)
    redraw(model, seed)
    return model.eval()


def from_config(raw, seed, dtype=None):
    """As `random_model`, of the class that a raw configuration names first; for families without a row above."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**raw)
    how = {"attn_implementation": "eager", "dtype": dtype or torch.float32}
    model = getattr(transformers, raw["architectures"][0])._from_config(config, **how)
    redraw(model, seed)
    return model.eval()


def redraw(model, seed):
    """Draw every parameter of `model` again, in place: no zero bias, no unit scale, no zero padding row.

    Matrices are 0.3 N, LayerNorm's scales 1 + 0.2 N, biases 0.1 N, kernels of convolutions sqrt(2 / fan in) N; running
    means 0.1 N, variances exp(0.3 N), and counts what 1,000 + 100 N rounds to. The draw of a parameter depends on the
    seed and on its name behind the trunk's prefix, so a trunk has the same weights under every head.
    """
    torch = pytest.importorskip("torch")
    prefix = model.base_model_prefix + "."
    statistics = {name: value for name, value in model.named_buffers() if name.endswith(_STATISTICS)}
    for name, parameter in (_parameters(model) | statistics).items():
        words = [seed, zlib.crc32(name.removeprefix(prefix).encode())]
        value = np.random.default_rng(words).standard_normal(tuple(parameter.shape))
        if name.endswith("running_var"):
            value = np.exp(0.3 * value)
        elif name.endswith("num_batches_tracked"):
            value = np.round(1000 + 100 * value)
        elif name.endswith((".bias", "running_mean")):
            value = 0.1 * value
        elif parameter.ndim == 1:
            value = 1 + 0.2 * value
        elif parameter.ndim == 4:
            value = value * np.sqrt(2 / np.prod(parameter.shape[1:]))
        else:
            value = 0.3 * value
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.asarray(value)))


def save(model, folder, tokenizer=False):
    """Write `model`, with a tiny tokenizer of its family if asked, in Hugging Face layout; give the path."""
    folder = Path(folder)
    with _no_progress_bar():
        model.save_pretrained(folder)
        if tokenizer:
            _tokenizer(model.config).save_pretrained(folder)
    return folder


def _tokenizer(config):
    """A tokenizer of the configuration's family over ASCII characters, with exactly `vocab_size` entries."""
    transformers = pytest.importorskip("transformers")
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    size = config.vocab_size
    if config.model_type in ("bert", "distilbert"):
        letters = [character for character in characters if not character.isupper()]
        letters.sort(key=lambda character: not character.islower())  # a to z survive the cut to `size`
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*special, *letters, *("##" + letter for letter in letters)]
        vocabulary = {piece: index for index, piece in enumerate(_exactly(pieces, size))}
        return transformers.BertTokenizer(vocab=vocabulary, model_max_length=config.max_position_embeddings)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    longest = config.max_position_embeddings - config.pad_token_id - 1
    if config.model_type == "roberta":
        pieces = [*_exactly([*special, "\u0120", *characters], size - 1), "<mask>"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        return transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=longest)
    pieces = [*_exactly([*special, "\u2581", *characters], size - 1), "<mask>"]
    scores = [(piece, 0.0 if piece in special else -float(index)) for index, piece in enumerate(pieces)]
    return transformers.XLMRobertaTokenizer(vocab=scores, model_max_length=longest)


def _exactly(pieces, size):
    """`pieces` cut or filled up to `size` entries."""
    return (pieces + [f"[unused{index}]" for index in range(size)])[:size]


def batch(family, vocab, shape, seed):
    """Inputs of the given (rows, length) as int32 arrays, with padding where implementations often go wrong.

    In every row the end is padding, masked (one to three tokens, differing between rows), and so is one place
    in the middle. One ordinary token is masked as well and one padding token is not, so positions counted
    from the mask differ from positions counted from the tokens. The last of three or more rows starts with
    padding. `bert` gets token types: both segments in every row, changing at different places. The length is
    at least 8.
    """
    rows, length = shape
    if length < 8:
        raise ValueError(f"a batch needs a length of at least 8 for its padding, got {length}")
    rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
    pad = 1 if "roberta" in family else 0
    input_ids = rng.integers(5, vocab, size=shape, dtype=np.int32)
    attention_mask = np.ones(shape, np.int32)
    for row in range(rows):
        end = length - 1 - row % 3
        input_ids[row, end:], attention_mask[row, end:] = pad, 0
        masked_pad, masked_token, seen_pad = rng.permutation(np.arange(1, end))[:3]
        input_ids[row, masked_pad], attention_mask[row, masked_pad] = pad, 0
        attention_mask[row, masked_token] = 0
        input_ids[row, seen_pad] = pad
    if rows >= 3:
        input_ids[-1, 0], attention_mask[-1, 0] = pad, 0
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family == "bert":
        change = rng.integers(2, length - 2, size=(rows, 1))
        arrays["token_type_ids"] = (np.arange(length)[None] >= change).astype(np.int32)
    return arrays


def batch_for(raw, seed):
    """Inputs for a model of a raw configuration: tokens as `batch` gives them, or images of an odd size."""
    if "vocab_size" in raw:
        return batch(raw["model_type"], raw["vocab_size"], (3, 11), seed)
    size = raw.get("image_size", (19, 22))
    size = (size, size) if isinstance(size, int) else tuple(size)
    pixels = np.random.default_rng(seed).standard_normal((3, *size, raw.get("num_channels", 3)))
    return {"pixel_values": pixels.astype(np.float32)}


def outputs(model, batch):
    """Outputs by name as numpy arrays, in the model's mode; `hidden_states` is a list, the embeddings first.

    The trunk's `last_hidden_state` and `pooler_output` are there under every head whose trunk has them.
    """
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        found = _forward(model, batch)
    arrays = {name: found[name].numpy() for name in _OUTPUTS if name in found}
    arrays["hidden_states"] = [state.numpy() for state in found["hidden_states"]]
    return arrays


def gradients(model, batch, cotangents):
    """Gradients of the sum over the named outputs of `(output * cotangent).sum()`, by on-disk parameter name.

    `cotangents` maps names of outputs to arrays of their shapes. A tied parameter appears once, with the sum
    over its uses; one that no named output reads has a gradient of zeros.

    torch gives the padding token's row no gradient from an embedding lookup (the word embedding of all
    families, and row `pad_token_id` of RoBERTa's position embedding), although the forward pass reads it like
    any other row.
    """
    torch = pytest.importorskip("torch")
    parameters = _parameters(model)
    with plain_convolutions():
        found = _forward(model, batch)
    missing = sorted(set(cotangents) - set(found))
    if missing:
        raise ValueError(f"no such outputs: {missing}; there are {sorted(set(found) - {'hidden_states'})}")
    weights = {name: torch.from_numpy(np.asarray(value)) for name, value in cotangents.items()}
    total = sum((found[name] * weight).sum() for name, weight in weights.items())
    with plain_convolutions():
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return _on_disk(model, {name: grad.contiguous() for name, grad in zip(parameters, grads, strict=True)})


@contextlib.contextmanager
def plain_convolutions():
    """Without oneDNN, whose backward pass of small convolutions crashes now and then (torch 2.13, several threads)."""
    mkldnn = pytest.importorskip("torch").backends.mkldnn
    before, mkldnn.enabled = mkldnn.enabled, False
    try:
        yield
    finally:
        mkldnn.enabled = before


def _parameters(model):
    """Parameters by in-memory name, a tied one once, under the name that `save_pretrained` keeps.

    `named_parameters()` alone keeps the name that comes first, which in XLM-RoBERTa is the decoder's.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if name not in model.all_tied_weights_keys}


def _forward(model, batch):
    """One forward pass: the head's outputs and its trunk's, by name."""
    trunk = {}
    hook = model.base_model.register_forward_hook(lambda module, args, output: trunk.update(output))
    try:
        inputs = {name: tensor(value) for name, value in batch.items()}
        head = model(**inputs, output_hidden_states=True)
    finally:
        hook.remove()
    return {name: value for name, value in (trunk | dict(head)).items() if value is not None}


def tensor(value):
    """An input as torch wants it: integers in 64 bits, images (B, H, W, C) with the channels first."""
    torch = pytest.importorskip("torch")
    found = torch.from_numpy(np.asarray(value))
    if not found.is_floating_point():
        return found.long()
    return found.permute(0, 3, 1, 2).contiguous() if found.ndim == 4 else found


def _on_disk(model, tensors):
    """Rename `tensors`, given by in-memory parameter name, as `save_pretrained` does."""
    pytest.importorskip("safetensors")
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder, _no_progress_bar():
        model.save_pretrained(folder, state_dict=tensors)
        return load_file(Path(folder) / "model.safetensors")


@contextlib.contextmanager
def _no_progress_bar():
    """Saving shows a progress bar otherwise."""
    logging = pytest.importorskip("transformers").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
