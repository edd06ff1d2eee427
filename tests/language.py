"""A tokenizer of bytes and a decoder to read them: what the tests of language modelling share."""

import functools

import jax

from jaxtransfer.models import family, init
from jaxtransfer.types import Head, Lineage, Source

EOS, BOS = 0, 1
RAW = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)


def byte_tokenizer(*, bos=False, eos=True, merges=(), template=None):
    """A token for each byte, from 4 on, and for each merge, such as ("a", "b"); special tokens where asked for."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names = letters + ["".join(pair) for pair in merges]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in letters[:4]])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {"eos_token": "<eos>"} if eos else {}
    special |= {"bos_token": "<bos>"} if bos else {}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **special)
    found.name_or_path = "bytes"
    return found


def spell(tokenizer, ids):
    """Tokens as a text, special ones by their names."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@functools.cache
def decoder(**overrides):
    """A Llama of 260 tokens with random parameters."""
    raw = RAW | overrides
    model = family("llama").build(raw, Head("causal-lm"))
    return Source(model, init(model, jax.random.key(0)), Lineage("memory", ""), {"config": raw})
