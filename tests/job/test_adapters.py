"""Runs with adapters and quantised sources: what they keep, that it is put together again, what is refused and how."""

import dataclasses
import json
import re
import shutil
import sys
import typing
from functools import partial

import jax
import numpy as np
import pytest

from jaxtransfer import checkpoint, cli, job
from jaxtransfer.adapt.adapters import AdapterError
from jaxtransfer.config import adapters, dump
from jaxtransfer.config.decode import tag
from jaxtransfer.job import commands, models, prepare
from jaxtransfer.job.train import predictions
from jaxtransfer.models import apply
from jaxtransfer.optim import GroupError
from jaxtransfer.run import DivergenceError, Interrupted, Progress
from jaxtransfer.source import ExportError, PeftError, load, load_adapter
from jaxtransfer.tree import fingerprint, flatten
from jaxtransfer.tree.paths import map_with_path
from jaxtransfer.tree.weights import is_weight
from tests.job.world import Library, World, console, during, lines

KERNELS = r"blocks/\d+/(attention|mlp)/\w+/kernel"
METHODS = {
    "lora": {"train": "adapters", "adapters": [{"method": "lora", "rank": 4, "dropout": 0.1}]},
    "qlora": {"train": "lora_plus", "quantize": [[KERNELS, "nf4"]], "adapters": [{"method": "lora", "rank": 2}]},
    "ia3": {"train": "adapters", "adapters": [{"method": "ia3"}]},
    "prompt": {"train": "adapters", "adapters": [{"method": "prompt", "length": 4}]},
    "bottleneck": {"train": "adapters", "adapters": [{"method": "bottleneck", "width": 4, "where": ["mlp"]}]},
}
LORA = METHODS["lora"]
IDS = {"input_ids": np.arange(5, 17, dtype=np.int32).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int32)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.raw["task"] = {"max_length": 12}
    world.raw["data"]["buckets"] = [12]
    world.raw["optimizer"]["lr"] = 2e-2
    return world


def made(world, adapt, **changes):
    return prepare.prepare(world.config(world.root / "none", adapt=adapt, **changes), lambda text: None)


@pytest.fixture(scope="module", params=METHODS)
def ran(world, request):
    """A run by each method, its name, its folder and what was said; one of them was stopped and resumed."""
    out, screen = world.root / request.param, console()
    config = world.config(out, adapt=METHODS[request.param], run__evaluate_every=2)
    if request.param == "qlora":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            during(patch, 3)
            job.run(config, console=screen)
        assert [len(list(job.predict(out, ["a good lamp"]))), (out / "result.json").exists()] == [1, False]
    job.run(config, console=screen)
    return request.param, out, screen.file.getvalue()


def test_a_stopped_run_is_that_of_an_undisturbed_one(ran, world):
    if ran[0] != "qlora":
        pytest.skip("was not stopped")
    out = world.root / "undisturbed"
    job.run(world.config(out, adapt=METHODS["qlora"], run__evaluate_every=2), console=console())
    assert lines(out) == lines(ran[1])
    assert result(out)["metrics"] == result(ran[1])["metrics"]


def result(out):
    return json.loads((out / "result.json").read_text())


def logits(source):
    return np.asarray(jax.jit(partial(apply, source.model))(source.params, IDS)["logits"])


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_run_of_other_devices_is_put_together_here(ran):
    _, out, _ = ran
    file = out / "config.yaml"
    text = file.read_text()
    assert "attention: xla" in text
    file.write_text(text.replace("attention: xla", "attention: splash"))
    try:
        assert len(list(job.predict(out, ["a good lamp"]))) == 1
    finally:
        file.write_text(text)


def test_a_run_is_put_together_again_without_its_data(ran, world, monkeypatch):
    _, out, said = ran
    page = result(out)
    assert ("resumed at step 3 of 8" in said) == (ran[0] == "qlora")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read", None)  # the training data
        found = job.evaluate(out)
        answers = list(job.predict(out, ["a good lamp", "the dull film"]))
    for metric, cell in page["metrics"]["test"].items():
        assert found[metric]["value"] == pytest.approx(cell["value"], rel=1e-5), metric
    assert [answer["label"] in ("negative", "positive") for answer in answers] == [True, True]
    at_best = [line for line in lines(out) if line["kind"] == "eval" and line["step"] == page["run"]["best_step"]]
    assert at_best[0]["loss"] == pytest.approx(page["metrics"]["validation"]["loss"]["value"], rel=1e-6)
    assert [line["step"] for line in lines(out) if line["kind"] == "eval"] == [2, 4, 6, 8]


def test_the_base_is_the_source_s_own_and_is_not_written(ran, world):
    _, out, _ = ran
    source = models.adapted(out)
    config = models.config_of(out)
    base = load(world.source, head=None, quantize=config.adapt.quantize).params
    kept = {re.sub("@base", "", path): value for path, value in fingerprint(source.params).items()}
    assert fingerprint(base).items() <= kept.items()
    assert any("swap_head" in note for note in source.lineage.operations)
    assert source.lineage.operations[-1].startswith("fit(steps=")
    best = out / "checkpoints" / str(result(out)["run"]["best_step"])
    leaves = checkpoint.metadata(best)["leaves"]
    written = {path for path, leaf in leaves.items() if path.startswith("frozen/") and leaf["written"]}
    assert all(path.endswith("@scale") for path in written)


def test_what_is_the_model_of_a_run(ran, world, tmp_path):
    name, out, said = ran
    page = result(out)
    if name == "bottleneck":
        assert page["run"]["export"] == str(out / "checkpoints" / str(page["run"]["best_step"]))
        assert "the model is the best checkpoint, beside source (export: PEFT has no form of what" in said
        with pytest.raises(PeftError, match="PEFT has no form of what stands at blocks/0/adapter"):
            job.export(out, tmp_path / "peft", format="peft")
        return
    assert page["run"]["export"] == str(out / "adapter")
    assert f"the model is {out / 'adapter'}, beside source" in said
    assert ("jaxtransfer merge" in said) == (name != "prompt")
    size = sum(path.stat().st_size for path in (out / "adapter").glob("*.safetensors"))
    assert size < (world.source / "model.safetensors").stat().st_size / 3
    source = models.adapted(out)
    bare = prepare.prepare(models.config_of(out), lambda text: None)
    headed = dataclasses.replace(
        prepare.adapting.headed(bare.config, bare.trunk, bare.task, jax.random.key(9)), assets=source.assets
    )
    folder = job.export(out, tmp_path / "peft", format="peft")
    assert np.array_equal(logits(load_adapter(headed, folder)), logits(source))


def test_merged_it_is_one_model(ran, world, tmp_path, capsys):
    name, out, _ = ran
    with pytest.raises(ExportError, match=r"what it trained stands beside its source: .*--format peft writes it"):
        job.export(out)
    if name in ("prompt", "bottleneck"):
        with pytest.raises(AdapterError, match=f"a {name} is no part of a weight, and cannot be merged into one"):
            job.merge(out)
        return
    if name == "qlora":
        assert cli.main(["merge", str(out)]) == 4
        assert "its source is quantised, merging makes it as large as it was: say --deq" in capsys.readouterr().err
    words = ["--dequantize"] if name == "qlora" else []
    assert cli.main(["merge", str(out), "--to", str(tmp_path / "one"), *words]) == 0
    assert capsys.readouterr().out == f"merged  {tmp_path / 'one'}\n"
    one = load(tmp_path / "one")
    assert not any(map(is_weight, jax.tree.leaves(one.params, is_leaf=is_weight)))
    assert one.model.head.labels == ("negative", "positive")
    close(logits(one), logits(models.adapted(out)))


@pytest.mark.parametrize("ran", ["qlora"], indirect=True)
def test_another_source_is_refused(ran, world, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(ran[1], out)
    (out / "config.yaml").write_text(
        (out / "config.yaml").read_text().replace(str(world.source), str(tmp_path / "other"))
    )
    from safetensors.numpy import load_file, save_file

    shutil.copytree(world.source, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    save_file({name: array + 1 for name, array in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError, match=r"was trained beside source with digest \w+, but other has"):
        job.evaluate(out)
    shutil.copy(world.source / "model.safetensors", weights)
    settings = tmp_path / "other" / "config.json"
    settings.write_text(settings.read_text().replace('"initializer_range": 0.1', '"layer_norm_eps": 0.1'))
    with pytest.raises(checkpoint.CheckpointError, match=r"whose config\.json is another file by now"):
        job.evaluate(out)


BAD = {
    "a rank above the dimension": (
        {"adapters": [{"method": "lora", "rank": 65}]},
        r"adapt.adapters\[0\]: lora: blocks/0/attention/\w+/kernel: rank 65 is above the smaller side of its",
    ),
    "a leaf that takes none": (
        {"adapters": [{"method": "ia3"}, {"method": "dora", "targets": "blocks/0/mlp/norm/scale"}]},
        r"adapt.adapters\[1\]: dora: blocks/0/mlp/norm/scale: a leaf of shape \(64,\) takes no adapter",
    ),
    "one name twice": (
        {"adapters": [{"method": "lora"}, {"method": "lora", "targets": ".*/mlp/up/kernel"}]},
        r"adapt.adapters\[1\]: lora: blocks/0/mlp/up/kernel: has an adapter called 'default' already",
    ),
    "one that is covered by another": (
        {"adapters": [{"method": "lora"}, {"method": "lora", "name": "more"}]},
        r"adapt.adapters\[0\]: nothing of it trains, .*kernel@base@\w+ and all others are frozen: another adapter is",
    ),
    "one that the rules freeze": (
        {"train": "rules", "rules": [["head/.*", "head"], [".*", "frozen"]], "adapters": [{"method": "lora"}]},
        r"adapt.adapters\[0\]: nothing of it trains, .* are frozen: adapt.rules freeze it",
    ),
    "targets of nothing": (
        {"adapters": [{"method": "lora", "targets": "blocks/./attn/q/kernel"}]},
        r"adapt.adapters\[0\]: lora: rule 'blocks/./attn/q/kernel' matches none of .*; nearest paths: blocks/\d",
    ),
    "layers of nothing": (
        {"adapters": [{"method": "bottleneck", "targets": "blocks/9"}]},
        r"adapt.adapters\[0\]: bottleneck: rule 'blocks/9' matches none of 2 leaves; nearest paths: blocks/",
    ),
    "an activation of nobody": (
        {"adapters": [{"method": "bottleneck", "activation": "step"}]},
        r"adapt.adapters\[0\]: bottleneck: .*activation one of .*'step'",
    ),
    "a prompt beyond the positions": (
        {"adapters": [{"method": "prompt", "length": 5}]},
        r"task.max_length: .*16",
    ),
    "two prefixes": (
        {"adapters": [{"method": "prefix"}, {"method": "prefix"}]},
        r"adapt.adapters\[1\]: prefix: blocks/0/prefix: something stands there already",
    ),
    "a quantisation of nothing": (
        {"train": "head", "quantize": [["layers/.*", "int8"]]}, r"adapt.quantize: rule 'layers/\.\*' matches none of",
    ),
    "a quantisation that does not fit": (
        {"train": "head", "quantize": [["embed/word/embedding", "nf4"]]},
        r"adapt.quantize: embed/word/embedding: NF4 takes matrices .* use int8",
    ),
    "a quantised weight that would train": (
        {"train": "last", "last": 1, "quantize": [[KERNELS, "int8"]]},
        r"adapt.quantize: blocks/1/\S+ is Int8 and cannot train, but is labelled 'trunk'; freeze it, or leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_told_before_any_work(name, world, tmp_path, capsys, monkeypatch):
    adapt, says = BAD[name]
    path = tmp_path / "run.yaml"
    path.write_text(dump(world.config(tmp_path / "out", adapt={"train": "adapters", **adapt})))
    assert cli.main(["run" if name == "one name twice" else "explain", str(path)]) == 2
    err = capsys.readouterr().err
    assert re.match(f"jaxtransfer: error: {says}", err) and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_explain_shows_which_adapter_sits_where(world, tmp_path, capsys):
    entries = [
        {"method": "lora", "rank": 4, "targets": r"blocks/1/attention/(query|value)/kernel"},
        {"method": "vera", "rank": 8, "targets": r".*/mlp/up/kernel", "name": "v"},
        {"method": "prefix", "length": 3},
    ]
    adapt = {"train": "adapters", "adapters": entries, "quantize": [[KERNELS, "nf4"]]}
    path = tmp_path / "run.yaml"
    path.write_text(dump(world.config(tmp_path / "out", adapt=adapt)))
    assert cli.main(["explain", str(path)]) == 0
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    sides = 4 * (64 + 64)
    trained = 2 * sides + 2 * (8 + 64) + 2 * 2 * 3 * 64
    assert ["adapter", "12", f"{trained:,}"] == next(row for row in out if row[:1] == ["adapter"])[:3]
    for row in (
        ["lora", "blocks/1/attention/query/kernel", "2", str(sides)],
        ["vera", "'v'", "blocks/0-1/mlp/up/kernel", "4", str(2 * (8 + 64))],
        ["prefix", "blocks/0-1/prefix/key", "2", str(2 * 3 * 64)],
    ):
        assert row in [line[: len(row)] for line in out], row
    (packed,) = (line for line in out if line[:2] == ["NF4", "blocks/0-1/mlp/up/kernel"])
    assert packed[3] == f"{2 * 64 * 64:,}" and packed[4:] == ["4.1", "KiB"]
    bare = sum(leaf.size for leaf in flatten(load(world.source, head=None).params).values())
    (frozen,) = (line for line in out if line[:1] == ["frozen"])
    scales, shared = 2, 2 * 8 * 64
    assert int(frozen[2].replace(",", "")) == bare + scales + shared
    rows = {row.group: row.parameters for row in made(world, adapt).rows()}
    assert rows["frozen"] == bare + scales + shared  # what a run prints is the same


def test_every_field_of_an_adapter_is_read(world, monkeypatch):
    read, kinds = set(), typing.get_args(adapters.AdapterConfig)

    def watched(record, name):
        if "/jaxtransfer/job/" in sys._getframe(1).f_code.co_filename.replace("\\", "/"):
            read.add((type(record).__name__, name))
        return object.__getattribute__(record, name)

    for kind in kinds:
        monkeypatch.setattr(kind, "__getattribute__", watched)
    names = [tag(kind)[1] for kind in kinds]
    assert sorted(names) == ["bottleneck", "dora", "ia3", "lora", "prefix", "prompt", "vera"]
    for name in names:
        made(world, {"train": "adapters", "adapters": [{"method": name, **SMALL.get(name, {})}]})
    every = {(kind.__name__, field.name) for kind in kinds for field in dataclasses.fields(kind)[1:]}
    assert every - read == set()


SMALL = {"prompt": {"length": 2}, "vera": {"rank": 8}}


def test_defaults_are_the_linear_kernels_of_the_layers(world):
    entries = [{"method": "bottleneck", "width": 2}, {"method": "dora", "rank": 2}]
    flat = flatten(made(world, {"train": "adapters", "adapters": entries}).adapted(0).params, is_leaf=is_weight)
    adapted = {path for path, node in flat.items() if is_weight(node)}
    assert adapted == {path for path in flat if re.fullmatch(KERNELS, path)}
    gains = {
        path: node.on
        for path, node in flatten(made(world, METHODS["ia3"]).adapted(0).params, is_leaf=is_weight).items()
        if is_weight(node)
    }
    ends = {"attention/key": "output", "attention/value": "output", "mlp/down": "input"}
    assert gains == {f"blocks/{i}/{end}/kernel": on for i in range(2) for end, on in ends.items()}
    only = {"train": "adapters", "adapters": [{"method": "ia3", "targets_input": "blocks/0/mlp/up/kernel"}]}
    flat = flatten(made(world, only).adapted(0).params, is_leaf=is_weight)
    assert [path for path, node in flat.items() if is_weight(node)] == ["blocks/0/mlp/up/kernel"]


def test_adapters_are_those_of_the_seed_and_unchanged_by_others(world):
    job_ = made(world, LORA)
    first, again, other = (flatten(job_.adapted(seed).params) for seed in (0, 0, 1))
    a = "blocks/0/mlp/up/kernel@a"
    assert np.array_equal(first[a], again[a]) and not np.array_equal(first[a], other[a])
    two = made(world, {**LORA, "adapters": [*LORA["adapters"], {"method": "prompt", "length": 2}]})
    assert np.array_equal(flatten(two.adapted(0).params)[a], first[a])


def test_rates_of_groups(world):
    plus = {"train": "lora_plus", "adapters": [{"method": "lora"}]}
    found = made(world, plus, optimizer__groups={"adapter": {"lr": 1e-3}, "head": {"lr": 1e-4}}).groups
    assert {name: group.lr for name, group in found.items()} == {"adapter": 1e-3, "adapter_b": 16e-3, "head": 1e-4}
    own = made(world, plus, optimizer__groups={"adapter_b": {"lr": 5e-3}}).groups
    assert (own["adapter"].lr, own["adapter_b"].lr) == (2e-2, 5e-3)
    for train, part in (("biases", "/bias"), ("norms", "norm/")):
        labels = flatten(made(world, {"train": train}).labels)
        assert {path for path, label in labels.items() if label == "trunk"} == {
            path for path in labels if part in path and not path.startswith("head/")
        }


def test_the_control_from_scratch_is_the_bare_architecture_all_of_it_trained(world):
    groups = {"adapter": {"lr": 1e-3}, "trunk": {"lr": 1e-4}}
    job_ = made(world, METHODS["qlora"], study={"seeds": [0]}, optimizer__groups=groups)
    assert set(job_.groups) == {"adapter", "adapter_b", "head"}
    control = job_.control
    assert {name: group.lr for name, group in control.groups.items()} == {"head": 2e-2, "trunk": 1e-4}
    state, frozen = control.start(0, scratch=True)
    assert not jax.tree.leaves(frozen)
    assert not any(map(is_weight, jax.tree.leaves(state.params, is_leaf=is_weight)))
    batch = next(control.loader("train", seed=0, train=True))
    after, _ = jax.eval_shape(control.step, state, frozen, batch)
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
    with pytest.raises(GroupError, match="optimizer group 'trunk' has no parameters"):
        made(world, METHODS["qlora"], optimizer__groups=groups)  # without a control nobody reads it


def test_what_no_class_of_theirs_computes_stays_a_checkpoint_and_merges_into_orbax(world, tmp_path):
    out, screen = tmp_path / "mean", console()
    config = world.config(out, adapt=METHODS["ia3"], task={"max_length": 12, "pooling": "mean"}, run__epochs=1)
    summary = job.run(config, console=screen)
    assert summary["model"] == str(out / "checkpoints" / "4")
    assert "the model is the best checkpoint, beside source (a sequence-classification head with pooling='mean'" in (
        screen.file.getvalue()
    )
    found = job.merge(out)
    assert "pooling='mean'" in found["note"]
    close(logits(load(found["merged"])), logits(models.adapted(out)))


def test_more_than_a_head_beside_adapters_is_no_folder_of_peft(world):
    rules = [["head/.*", "head"], [r".*@(a|b)", "adapter"], [r".*/bias", "trunk"], [".*", "frozen"]]
    job_ = made(world, {**LORA, "train": "rules", "rules": rules})
    source = job_.adapted(0)
    flat = flatten(source.params)
    assert flatten(job_.labels)["blocks/0/mlp/up/bias"] == "trunk"
    moved = map_with_path(lambda path, leaf: leaf + 1 if path == "blocks/0/mlp/up/bias" else leaf, source.params)
    with pytest.raises(PeftError, match="blocks/0/mlp/up/bias was trained beside the adapters, and PEFT's folder"):
        models.write_peft(dataclasses.replace(source, params=moved), world.root / "peft", {})
    assert flat.keys() == flatten(moved).keys()
    moved = map_with_path(lambda path, leaf: leaf + 1 if path == "blocks/0/mlp/up/kernel@base" else leaf, source.params)
    with pytest.raises(PeftError, match="blocks/0/mlp/up/kernel: the weight under the adapter is a fresh, trained or"):
        models.write_peft(dataclasses.replace(source, params=moved), world.root / "peft", {})
    packed = made(world, {"train": "head", "quantize": [[KERNELS, "int8"]]}).adapted(0)
    with pytest.raises(
        PeftError, match="there are no adapters for PEFT: leaves of the model itself were trained, beside p"
    ):
        models.write_peft(packed, world.root / "peft", {})


def test_a_finished_run_without_checkpoints_is_its_adapter(world, tmp_path):
    out = tmp_path / "run"
    job.run(world.config(out, adapt={**LORA, "quantize": [[KERNELS, "int8"]]}, run__epochs=1), console=console())
    before = logits(models.adapted(out))
    shutil.rmtree(out / "checkpoints")
    close(logits(models.adapted(out)), before)
    weights = out / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        checkpoint.DamagedError, match=r"adapter_model\.safetensors: is not the file that the run wrote"
    ):
        models.adapted(out)
    shutil.rmtree(out / "adapter")
    with pytest.raises(
        checkpoint.RunFolderError, match=r"checkpoints are gone, .*; remove result.json and resume it, which trains"
    ):
        models.adapted(out)


def test_a_checkpoint_that_is_removed_meanwhile_is_not_the_model(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        during(patch, 3)
        job.run(world.config(out, adapt=LORA, run__evaluate_every=2), console=console())
    expected, last = logits(models.adapted(out)), models.progress_of(out)
    gone = Progress(batch=1)  # was there, and is not when it is read
    told = iter([gone, gone])
    monkeypatch.setattr(models, "progress_of", lambda _: next(told, last))
    close(logits(models.adapted(out)), expected)
    monkeypatch.setattr(models, "progress_of", lambda _: gone)
    with pytest.raises(ValueError, match="/1"):  # and nothing has come after it
        models.adapted(out)


def test_an_export_replaces_nothing_that_a_run_is_put_together_from(ran, world, tmp_path):
    _, out, _ = ran
    other = tmp_path / "other"
    (other / "adapter").mkdir(parents=True)
    (other / "run.json").write_text("{}")
    for target in (other / "adapter", out / "checkpoints" / "4", out / "checkpoints"):
        with pytest.raises(
            ExportError, match=f"the run {target.parents[target.parent.name == 'checkpoints']} is put tog"
        ):
            job.export(out, target, format="peft")


def test_a_model_that_is_no_number_is_an_error_and_no_result(world, tmp_path):
    out = tmp_path / "nan"
    config = world.config(out, optimizer={"lr": 1e30, "clip": None}, run={"steps": 3, "epochs": None})
    with pytest.raises(
        DivergenceError, match=r"the loss on test is nan after 3 steps, . of which were not finite: there"
    ):
        job.run(config, console=console())
    assert not (out / "result.json").exists()
    assert list((out / "checkpoints").iterdir())


def test_exports_of_what_stands_beside_say_what_can_be_done(ran):
    name, out, _ = ran
    told = {"bottleneck": "only the run's own folder holds it", "prompt": "--format peft writes it alone, where"}
    with pytest.raises(ExportError, match=told.get(name, "folds it in, --format peft writes it alone")):
        job.export(out, format="orbax")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("library"))


def test_a_language_model_on_a_source_that_was_made_for_it(library):
    out = library.root / "made"
    part = {"data": {"train": {"path": library.data["source"]}, "batch": 4}, "run": {"steps": 2}}
    adapt = {"train": "adapters", "adapters": [{"method": "lora", "rank": 2}]}
    config = library.config(out, source__ref=str(library.bare), pretrain=part, adapt=adapt)
    job.run(config, console=console())
    for file in (library.root / "train.jsonl", library.root / "source.jsonl"):
        file.rename(file.with_suffix(".gone"))
    found, page = job.evaluate(out), result(out)
    for file in (library.root / "train.jsonl", library.root / "source.jsonl"):
        file.with_suffix(".gone").rename(file)
    assert found["loss"]["value"] == pytest.approx(page["metrics"]["test"]["loss"]["value"], rel=1e-5)
    assert page["before"]["loss"]["value"] != page["metrics"]["test"]["loss"]["value"]
    assert "".join(job.complete(out, "xyzxyz", max_new_tokens=4))
    merged = load(job.merge(out)["merged"])
    source = models.adapted(out)
    close(logits(merged), logits(source))
    assert source.lineage.ref == "bare"


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_source_is_measured_before_without_what_is_drawn_at_random(method, library):
    adapt = {"train": "adapters", "adapters": [{"method": method, "length": 2}]}
    adapted, plain = (
        prepare.prepare(library.config(library.root / "x", adapt=how, task__packing=False), lambda text: None)
        for how in (adapt, {"train": "full"})
    )
    start = adapted.start(0)
    found, drawn, wanted = (
        job_.task.metrics(predictions(job_, *start, "test", lambda: None))["loss"].value
        for job_, start in (
            (adapted, commands.unprompted(*start)), (adapted, start), (plain, plain.start(0)),
        )
    )  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-6) and abs(drawn - wanted) > 1e-4
