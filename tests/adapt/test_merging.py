"""What a merge makes of the biases beside its weights, and what it drops of an earlier merge."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxtransfer import export, load
from jaxtransfer.adapt import attaching as at
from jaxtransfer.adapt import heads, untie
from jaxtransfer.models import apply
from jaxtransfer.tree import flatten, unflatten
from jaxtransfer.types import Head
from tests import tiny
from tests.adapt.strategies import ENCODERS, KEY, encoder, moved, normal
from tests.models import zoo

DECODER = "head/decoder/kernel"


def biased(source):
    """A source none of whose biases is zero."""
    flat = flatten(source.params)
    drawn = {path: normal(*x.shape, seed=i) for i, (path, x) in enumerate(flat.items()) if path.endswith("/bias")}
    return dataclasses.replace(source, params=unflatten(flat | drawn))


def tuned(source, rules, **options):
    source = at.attach(source, rules, KEY, **options)
    return dataclasses.replace(source, params=moved(source.params))


def logits(source):
    return apply(source.model, source.params, zoo.inputs())["logits"]


@pytest.mark.parametrize("name", ENCODERS)
def test_gains_on_a_masked_lm_decoder_scale_its_bias_wherever_it_lies(name):
    source = biased(untie(encoder(name, heads.masked_lm())))
    source = tuned(tuned(source, [(DECODER, at.ia3())]), [(DECODER, at.lora(2))], name="outer")
    want = logits(source)
    kept = at.merge(source, keep=True)
    for merged in (at.merge(source), kept):
        zoo.assert_close(logits(merged), want)
        assert not jnp.allclose(merged.params["head"]["bias"], source.params["head"]["bias"], atol=0.1)
    assert tiny.same_bits(at.unmerge(kept).params, source.params)
    # A bias of that name under a head of one's own is something else.
    own = dataclasses.replace(source.model, head=Head("masked-lm", stages=source.model.stages[-1:]))
    other = at.merge(dataclasses.replace(source, model=own))
    assert jnp.array_equal(other.params["head"]["bias"], source.params["head"]["bias"])


def test_a_merge_drops_what_an_earlier_one_kept(tmp_path):
    kernel = r"blocks/\d/mlp/up/kernel"
    source = tuned(biased(tiny.source()), [(kernel, at.vera(4)), (r"blocks/\d/attention/key/kernel", at.ia3())])
    kept = at.merge(source, keep=True)
    with pytest.raises(at.AdapterError, match="merge: there are no adapters"):
        at.merge(kept, keep=True)
    merged = at.merge(kept)
    assert tiny.same_bits(merged.params, at.merge(source).params)
    assert tiny.same_bits(load(export(merged, tmp_path / "out")).params, merged.params)
    # Beside new adapters as well, on a weight that was merged and on another.
    again = tuned(kept, [("blocks/0/mlp/up/kernel|blocks/0/mlp/down/kernel", at.lora(2))])
    merged = at.merge(again)
    assert all(isinstance(leaf, jax.Array) and "@" not in path for path, leaf in flatten(merged.params).items())
    got, want = (apply(s.model, s.params, tiny.batch())["logits"] for s in (merged, again))
    zoo.assert_close(got, want)
