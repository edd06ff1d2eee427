"""Plans: what is counted agrees with XLA, what is held with what `init_state` makes; no weights, no data are read."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer import cli, config, job, plan
from jaxtransfer.config import ConfigError
from jaxtransfer.job import adapting, blueprints, meshes, planning, searching
from jaxtransfer.job.prepare import trained
from jaxtransfer.job.sources import sharding_rules
from jaxtransfer.job.tasks import make_task
from jaxtransfer.models import apply, attention, family, init
from jaxtransfer.models.api import layout_of
from jaxtransfer.parallel import make_mesh, spelled
from jaxtransfer.plan import hlo
from jaxtransfer.plan.chips import check_libtpu
from jaxtransfer.plan.compiled import wanted
from jaxtransfer.plan.traffic import traffic
from jaxtransfer.source import blank
from jaxtransfer.step import init_state
from jaxtransfer.tree import flatten, stack
from jaxtransfer.tree.stacks import layers_of
from jaxtransfer.types import Head

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
LORA = {
    "train": "rules",
    "rules": [[".*@(a|b)", "adapter"], [".*", "frozen"]],
    "quantize": [[r"blocks/\d+/mlp/\w+/kernel", "nf4"]],
    "adapters": [{"method": "lora", "rank": 4}],
}
quiet = partial(print, end="")


@pytest.fixture
def made(tmp_path):
    """A configuration of a tiny decoder, whose data are not there."""

    def make(raw=(), **sections):
        file = tmp_path / "tiny.json"
        file.write_text(json.dumps({**TINY, **dict(raw)}))
        return config.from_dict(
            {
                "source": {"ref": str(tmp_path / "nowhere"), "alternatives": [str(file)]},
                "data": {"train": {"path": "nowhere.jsonl"}, "batch": 16},
                "task": {"kind": "causal-lm", "max_length": 32},
                "run": {"steps": 10, "remat": "full"},
                "out": str(tmp_path / "out"),
                **sections,
            }
        )

    return make


def on_cpu(settings, **mesh):
    draft = blueprints.draft(settings, quiet)
    return draft, draft.on(make_mesh(**{"fsdp": 8, **mesh}))


# Slices


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v6:4x4", "did you mean v6e"),
        ("v5e", "v5e:4x4"),
        ("v5e:4x4x4", "2 axes of chips"),
        ("v5p:4x4", "3 axes of chips"),
        ("v5e:0x4", "v5e:4x4"),
        ("h200:2x4", "h200:8"),
        ("h201:8", "did you mean h200"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, told):
    with pytest.raises(plan.TopologyError, match=told):
        plan.topology(name)


def test_libtpu_must_be_there_and_be_that_of_jaxlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plan.TopologyError, match=r"not installed: pip install 'jaxtransfer\[plan\]'"):
        plan.devices(plan.topology("v5e:4x4"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "libtpu" else version(name))
    with pytest.raises(plan.TopologyError, match=r"libtpu 9\.9 is not the one of jaxlib .* released with 0\."):
        check_libtpu()
    with pytest.raises(plan.TopologyError, match="no compiler for h200"):
        plan.devices(plan.topology("h200:8"))


# Arithmetic


def test_operations_of_a_scanned_model_are_those_of_an_unrolled_one_and_xlas():
    wide = {**TINY, "hidden_size": 256, "intermediate_size": 512, "torch_dtype": "float32"}
    model = family("llama").build(wide, Head("causal-lm"))
    params = init(model, jax.random.key(0))
    batch = {"input_ids": jnp.zeros((2, 32), jnp.int32)}
    laid = stack(params, layout_of(model, params))

    def loss(params, batch):
        return jnp.mean(apply(model, params, batch)["logits"] ** 2)

    unrolled = plan.flops(jax.grad(loss), params, batch)
    assert unrolled == plan.flops(jax.grad(loss), laid, batch)
    xla = jax.jit(jax.grad(loss)).lower(params, batch).compile().cost_analysis()["flops"]
    assert unrolled == pytest.approx(xla, rel=0.05)
    # Two for each weight of a product and token in the forward pass, four in the backward, and the attention's.
    weights = sum(leaf.size for path, leaf in flatten(params).items() if path.endswith("kernel"))
    attention = 12 * 2 * 2 * 32 * 32 * 256
    assert unrolled == 6 * weights * 2 * 32 + attention


def test_a_loop_without_length_is_no_number():
    with pytest.raises(ValueError, match="no length"):
        plan.flops(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x), jnp.ones((4, 4)))


@pytest.mark.parametrize("adapt", [{"train": "full"}, {"train": "head"}, LORA], ids=["full", "head", "qlora"])
def test_bytes_are_those_of_a_real_state(made, adapt):
    settings = made(adapt=adapt)
    draft, drawn = on_cpu(settings)
    source = planned_source(settings)
    rules = sharding_rules(drawn.mesh, source.model, source.params)
    how = trained(settings, draft.task, source.model, source.params, 10, drawn.mesh, rules)
    state, frozen = init_state(
        source.model, source.params, how["labels"], how["tx"], jax.random.key(0), mesh=drawn.mesh, sharding=rules
    )
    labels, real = flatten(how["labels"]), {}
    for path, leaf in [*flatten(state.params).items(), *flatten(frozen).items()]:
        label = labels[layers_of(path)[0]]
        real[label] = real.get(label, 0) + leaf.addressable_shards[0].data.nbytes
    real["optimizer"] = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert {name: count for name, count in drawn.bytes().items() if name != "batch"} == real
    places = jax.tree.map(lambda leaf: leaf.sharding, (drawn.state.params, drawn.state.opt_state, drawn.frozen))
    assert jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state, frozen)) == places


def planned_source(settings):
    """The source of a plan with parameters, as a run makes it."""
    task = make_task(settings, None)
    trunk = blank(settings.source.alternatives[0], head=task.head, dtype=jnp.bfloat16)
    return adapting.begun(settings, adapting.quantized(settings, trunk), task, 0)


# Compiled programs


def test_collectives_are_counted_with_the_loops_around_them():
    mesh = make_mesh(fsdp=8)
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    text = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0], out_shardings=split).lower(x, w).compile().as_text()
    (found,) = hlo.collectives(hlo.parse(text))
    assert (found.kind, found.count) == ("all-gather", 5)
    assert found.bytes == 5 * 64 * 64 * 4 * 7 / 8


SCATTERED = """
HloModule scattered

%scatter (p: bf16[512,64]) -> bf16[128,64] {
  %p = bf16[512,64]{1,0} parameter(0)
  %sum = bf16[512,64]{1,0} all-reduce(%p), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %own = bf16[128,64]{1,0} dynamic-slice(%sum, %id, %zero), dynamic_slice_sizes={128,64}
}

ENTRY %main (x: bf16[512,64]) -> bf16[128,64] {
  %x = bf16[512,64]{1,0} parameter(0)
  ROOT %y = bf16[128,64]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    (found,) = hlo.collectives(hlo.parse(SCATTERED))
    assert found == hlo.Collective("reduce-scatter", 1, 512 * 64 * 2 * 3 / 4)


def test_traffic_reads_and_writes_each_array_once_and_of_a_stack_the_layer():
    x = jnp.zeros((256, 256), jnp.float32)
    text = jax.jit(lambda x: jnp.tanh(x) + 1).lower(x).compile().as_text()
    assert traffic(hlo.parse(text)) == 2 * x.nbytes
    stacked = jnp.zeros((64, 256, 256), jnp.float32)
    text = jax.jit(lambda w, i: jnp.tanh(w[i]) + 1).lower(stacked, 3).compile().as_text()
    assert traffic(hlo.parse(text)) < 4 * x.nbytes


NESTED = """
HloModule nested

%copied (p: f32[80,64,64]) -> f32[80,64,64] {
  %p = f32[80,64,64]{2,1,0} parameter(0)
  ROOT %c = f32[80,64,64]{1,2,0} copy(%p)
}

%layer (p.1: f32[80,64,64], i.1: s32[]) -> f32[64,64] {
  %p.1 = f32[80,64,64]{2,1,0} parameter(0)
  %same = f32[80,64,64]{1,2,0} fusion(%p.1), kind=kLoop, calls=%copied
  %i.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%same, %i.1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %w = f32[64,64]{1,0} bitcast(%slice)
}

%product (x.2: f32[64,64], p.2: f32[80,64,64], i.2: s32[]) -> f32[64,64] {
  %x.2 = f32[64,64]{1,0} parameter(0)
  %p.2 = f32[80,64,64]{2,1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %w.2 = f32[64,64]{1,0} fusion(%p.2, %i.2), kind=kLoop, calls=%layer
  ROOT %y.2 = f32[64,64]{1,0} convolution(%x.2, %w.2), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[64,64], p: f32[80,64,64], i: s32[]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %p.3 = f32[80,64,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[64,64]{1,0} fusion(%x, %p.3, %i), kind=kOutput, calls=%product
}
"""


def test_traffic_of_a_layer_sliced_inside_of_fused_computations_is_the_layer():
    matrix, scalar = 64 * 64 * 4, 4
    assert traffic(hlo.parse(NESTED)) == 3 * matrix + scalar


# As libtpu spreads a gather over what is computed beside it; S(1) is memory on the chip.
SPREAD = """
%start (p.1: f32[16,64]) -> (f32[16,64], f32[64,64], u32[]) {
  %p.1 = f32[16,64]{1,0:S(1)} parameter(0)
  %gather.1 = f32[64,64]{1,0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
  ROOT %c.1 = (f32[16,64]{1,0:S(1)}, f32[64,64]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.2: f32[16,64], q.2: f32[64,64], x.2: f32[32,32]) -> (f32[32,32], f32[64,64]) {
  %p.2 = f32[16,64]{1,0:S(1)} parameter(0)
  %q.2 = f32[64,64]{1,0} parameter(1)
  %x.2 = f32[32,32]{1,0} parameter(2)
  %tanh.2 = f32[32,32]{1,0} tanh(%x.2)
  %gather.2 = f32[64,64]{1,0} all-gather(%p.2), channel_id=3, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
  ROOT %t.2 = (f32[32,32]{1,0}, f32[64,64]{1,0}, f32[64,64]{1,0}) tuple(%tanh.2, %q.2, %gather.2)
}

%done (p.3: f32[16,64], q.3: f32[64,64]) -> f32[64,64] {
  %p.3 = f32[16,64]{1,0:S(1)} parameter(0)
  %q.3 = f32[64,64]{1,0} parameter(1)
  %gather.3 = f32[64,64]{1,0} all-gather(%p.3), channel_id=3, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="1"}
  ROOT %c.3 = f32[64,64]{1,0} custom-call(%p.3, %q.3, %gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[16,64], x: f32[32,32]) -> f32[64,64] {
  %p = f32[16,64]{1,0:S(1)} parameter(0)
  %x = f32[32,32]{1,0} parameter(1)
  %begun = (f32[16,64]{1,0:S(1)}, f32[64,64]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %shard = f32[16,64]{1,0:S(1)} get-tuple-element(%begun), index=0
  %whole = f32[64,64]{1,0} get-tuple-element(%begun), index=1
  %going = (f32[32,32]{1,0}, f32[64,64]{1,0}, f32[64,64]{1,0}) fusion(%shard, %whole, %x), kind=kLoop, calls=%beside
  %y = f32[32,32]{1,0} get-tuple-element(%going), index=0
  %rest = f32[64,64]{1,0} get-tuple-element(%going), index=2
  ROOT %z = f32[64,64]{1,0} fusion(%shard, %rest), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_gather_that_goes_on_beside_other_work_is_counted_once():
    program = hlo.parse(SPREAD)
    assert traffic(program) == 64 * 64 * 4 + 2 * 32 * 32 * 4
    assert hlo.collectives(program) == [hlo.Collective("all-gather", 1, 64 * 64 * 4 * 3 / 4)]


# As libtpu writes loops: the condition compares a counter with a constant, here four passes, two at a time.
LOOP = """
%body (p: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %p = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %cp = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}
  %done = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%cp)
  ROOT %t = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %done)
}

%condition (q: (u32[], bf16[8,128])) -> pred[] {
  %q = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = u32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %while = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""


def test_the_length_of_a_loop_is_read_off_its_counter():
    (found,) = hlo.collectives(hlo.parse(LOOP))
    assert (found.kind, found.count, found.bytes) == ("collective-permute", 4, 4 * 8 * 128 * 2)
    with pytest.raises(ValueError, match="loop while cannot be read"):
        hlo.collectives(hlo.parse(LOOP.replace("direction=LT", "direction=NE")))


def test_a_compiled_plan_agrees_with_the_compilers_own_count(made):
    draft, drawn = on_cpu(made(), data=2, fsdp=4)
    found = plan.compiled(drawn)
    assert found.fits and found.padding == 0
    kinds = {one.kind for one in found.collectives}
    assert kinds <= set(hlo.COLLECTIVES) and "all-reduce" in kinds
    assert 0 < found.traffic < 1e9
    trial = searching.given(draft.config, draft.config.mesh)
    e = searching.estimated(draft, drawn, dataclasses.replace(trial, mesh={"data": 2, "fsdp": 4, "tensor": 1}))
    assert e.temporaries == pytest.approx(found.temporaries, rel=1.0)  # an estimate: within a factor of two


def test_frozen_layers_need_no_gradient_no_optimizer_and_a_third_of_the_operations(made):
    full, head = (on_cpu(made(adapt={"train": how}))[1] for how in ("full", "head"))
    counts = [plan.count(plan.trace(one)) for one in (full, head)]
    assert counts[1] < 0.5 * counts[0]
    assert head.gradients < 0.3 * full.gradients
    assert head.bytes()["optimizer"] == pytest.approx(2 * head.gradients, rel=0.01)


# The command


def test_what_attention_computes_twice_is_no_need_of_the_model(made, monkeypatch):
    def counted():
        draft = blueprints.draft(made(adapt={"train": "full"}), quiet)
        _, needed, done = searching.drawn(
            draft, dataclasses.replace(searching.given(draft.config, draft.config.mesh), remat=None),
            plan.topology("h200:1"),
        )  # fmt: skip
        return needed, done

    whole = counted()
    assert whole[0] == whole[1]
    monkeypatch.setattr(attention, "SCORES", 1)
    monkeypatch.setattr(attention, "ROWS", 4)
    needed, done = counted()
    assert needed == whole[0]
    assert done > needed


def test_gpus_are_planned_by_arithmetic_and_it_says_so(made):
    page = job.plan(made(mesh={"data": 2, "fsdp": 2, "tensor": 2}), "h100:8", say=quiet)
    assert "no compiler for h100 is at hand" in page["by"]
    assert page["fits"].startswith("yes")
    assert {line.what for line in page["memory"]} >= {"trunk", "head", "optimizer", "temporaries", "total"}
    assert [bound.what for bound in page["bounds"]] == ["arithmetic", "memory", "links"]


def test_a_mesh_is_chosen_for_a_slice_that_is_not_here(made, monkeypatch):
    page = job.plan(made(mesh="auto"), "h100:8", say=quiet)
    assert page["mesh"].startswith("mesh: auto took data 8: of 79.00 GiB a device holds 0.00 of parameters")
    monkeypatch.setitem(plan.CHIPS, "h100", dataclasses.replace(plan.CHIPS["h100"], hbm=2.0**21))
    page = job.plan(made(mesh="auto"), "h100:8", say=quiet)
    assert page["mesh"].startswith("mesh: auto took data 2 x fsdp 4: ")
    with pytest.raises(ConfigError, match="16 rows in 1 microbatches do not divide over 6 devices"):
        job.plan(made(mesh="auto"), "h100:6", say=quiet)


def test_what_does_not_fit_is_an_answer(made, monkeypatch):
    small = dataclasses.replace(plan.CHIPS["h100"], hbm=2.0**20)
    monkeypatch.setitem(plan.CHIPS, "h100", small)
    settings = made(mesh={"data": 8}, adapt={"train": "head"})
    page = job.plan(settings, "h100:8", say=quiet)
    assert page["fits"] == "no"
    assert "GiB over the 0.00 of a device; the most is temporaries" in page["why"]
    wide = made(raw={"num_hidden_layers": 64}, mesh={"data": 8}, adapt={"train": "head"}, task={**SHORT}, data=FEW)
    page = job.plan(wide, "h100:8", say=quiet)
    assert "the most is frozen" in page["why"] and "mesh.data 1 and mesh.fsdp 8" in page["why"]
    assert "quantise it (adapt.quantize)" in page["why"]


SHORT = {"kind": "causal-lm", "max_length": 8}
FEW = {"train": {"path": "nowhere.jsonl"}, "batch": 8}


def test_the_compilers_words_about_memory_are_read():
    message = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G."
    assert wanted(message, 5 * 2**30) == 15 * 2**30


@pytest.mark.parametrize(
    ("sections", "topology", "told"),
    [
        ({"mesh": {"fsdp": 4}}, "h100:8", "is 4 devices, h100:8 has 8"),
        ({"mesh": {"data": 8}, "data": {**FEW, "batch": 12}}, "h100:8", "12 rows do not divide by 8"),
        ({"mesh": {"tensor": 3}}, "h100:3", "2 heads of keys and values do not divide by tensor = 3"),
        ({"task": {"kind": "causal-lm", "max_length": 128}, "mesh": {"data": 8}}, "h100:8", "the model has 64"),
        ({"adapt": {**LORA, "quantize": [["blocks/9/.*", "nf4"]]}, "mesh": {"data": 8}}, "h100:8", "matches none"),
    ],
)
def test_what_cannot_be_planned_is_refused(made, sections, topology, told):
    with pytest.raises(ValueError, match=told):
        job.plan(made(**sections), topology, say=quiet)


def test_a_search_ranks_what_fits_and_writes_the_best(made, tmp_path):
    to = tmp_path / "best.yaml"
    settings = made(mesh={"fsdp": 8})
    page = job.plan(settings, "h100:8", search=True, to=to, say=quiet)
    best = config.load(to)
    assert page["mesh"] == spelled(dataclasses.asdict(best.mesh))
    assert best == dataclasses.replace(settings, mesh=best.mesh, run=best.run)
    assert len(page["tried"]) == searching.SHOWN
    times = [row["ms"] for row in page["tried"]]
    assert times == sorted(times)
    with pytest.raises(ConfigError, match="is there already"):
        job.plan(settings, "h100:8", search=True, to=to, say=quiet)


def test_a_search_whose_result_has_no_folder_is_refused_before_it_begins(made, tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        job.plan(made(), "h100:8", search=True, to=tmp_path / "no" / "best.yaml", say=quiet)


def test_a_search_that_compiles_takes_the_fastest_that_fits(made):
    draft = blueprints.draft(made(), quiet)
    where = plan.topology("h100:8")
    trials = [searching.Ranked(searching.Trial({"data": 8, "fsdp": 1, "tensor": 1}, "full", n), 0, 0) for n in (1, 2)]
    best, rows = searching.compile_best(draft, trials, where, jax.devices(), quiet)
    assert [row["compiled"] for row in rows] == ["fits", "fits"]
    assert round(best.ms, 1) == min(row["real_ms"] for row in rows)


def test_images_are_planned_from_the_models_own_size(made, tmp_path):
    settings = config.load(ROOT / "configs/demo-vision.yaml")
    settings = dataclasses.replace(
        settings, source=dataclasses.replace(settings.source, ref=str(ROOT / "configs/models/digits-vit.json")),
        mesh=dataclasses.replace(settings.mesh, data=8), data=dataclasses.replace(settings.data, batch=64),
    )  # fmt: skip
    draft = blueprints.draft(settings, quiet)
    assert draft.batch["pixel_values"].shape == (64, 8, 8, 1)
    assert draft.batch["labels"].dtype == np.int32


def test_the_command_line(made, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(config.dump(made(mesh={"data": 8})))
    assert cli.main(["plan", str(file), "--topology", "h100:8", "--run.remat", "dots"]) == 0
    shown = capsys.readouterr().out
    assert "remat        dots" in shown and "utilisation" in shown
    assert cli.main(["plan", str(file), "--topology", "h10:8"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert cli.main(["plan", str(file), "--topology", "h100:8", "--to", "x.yaml"]) == 2
    assert "--to: is where --search writes" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pods").glob("*.yaml")), ids=lambda path: path.stem)
def test_pods_name_a_slice_that_their_mesh_is(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings, text = config.load(path), path.read_text()
    where = plan.topology(text.partition("--topology ")[2].split()[0])
    meshes.check_mesh(dataclasses.asdict(settings.mesh), where, settings.data.batch, settings.run.accumulate)


def test_a_kernel_of_tpus_is_refused_on_gpus(made):
    run = {"steps": 10, "attention": "splash"}
    with pytest.raises(config.ConfigError, match="h200:8 has none; take xla"):
        planning.plan(made(mesh={"fsdp": 8}, run=run), "h200:8", say=quiet)


# With libtpu


@pytest.mark.tpu
def test_a_slice_of_tpus_is_compiled_for(made):
    page = planning.plan(made(mesh={"fsdp": 4}), "v5e:2x2", say=quiet)
    assert page["by"].startswith("libtpu") and page["fits"].startswith("yes")
    assert {row["kind"] for row in page["collectives"]} & {"all-gather", "collective-permute"}
    with pytest.raises(plan.TopologyError, match="no such slice"):
        planning.plan(made(mesh={"fsdp": 9}, data={**FEW, "batch": 9}), "v5e:3x3", say=quiet)


@pytest.mark.tpu
def test_a_slice_that_is_too_small_is_an_answer(made):
    large = {"num_hidden_layers": 2, "vocab_size": 400_000, "hidden_size": 8192, "intermediate_size": 8192}
    page = planning.plan(made(raw=large, mesh={"fsdp": 4}), "v5e:2x2", say=quiet)
    assert page["fits"] == "no"
    assert "GiB over the 15.75 of a device" in page["why"]


@pytest.mark.tpu
def test_splash_attention_is_compiled_for_and_its_scores_are_never_in_memory(made):
    """One layer that attends all tokens and one with a window, queries split over devices."""
    window = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **sizes, **window}
    run = {"steps": 10, "remat": "full", "precision": "bfloat16", "attention": "splash"}
    mesh = {"fsdp": 2, "sequence": 2}
    draft = blueprints.draft(made(raw=qwen, task={"kind": "causal-lm", "max_length": 2048}, mesh=mesh, run=run), quiet)
    on = meshes.device_mesh({"data": 1, "tensor": 1, **mesh}, plan.devices(plan.topology("v5p:2x2x1")))
    found, scores = plan.compiled(draft.on(on)), 8 * 4 * 1024 * 2048 * 4  # rows, heads, queries and keys of a device
    assert found.temporaries < scores
    assert found.traffic < 2 * 6 * scores  # of two layers, written and read forward, once more, and backward
