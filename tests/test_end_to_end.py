"""Whole runs through the command line, and signals at every stage of them, here and in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtransfer import checkpoint, cli
from jaxtransfer import config as configs
from tests.job.world import World, during, lines

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def written(world, folder, **changes):
    """A configuration file of a run into ``folder/out``."""
    path = folder / "run.yaml"
    path.write_text(configs.dump(world.config(folder / "out", **changes)))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The result and the events of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli.main(["run", written(world, folder)]) == 0
    return outcome(folder / "out")


def outcome(out):
    page = json.loads((out / "result.json").read_text())
    return {"metrics": page["metrics"], "best": page["run"]["best_step"], "wrong": page["wrong"], "lines": lines(out)}


def test_every_command_of_a_newcomer(world, tmp_path, capsys):
    path, out = written(world, tmp_path, run__epochs=6), str(tmp_path / "out")

    def command(*words):
        assert cli.main([*words]) == 0, capsys.readouterr().err
        said, err = capsys.readouterr()
        assert err == ""
        return said

    assert "head" in command("explain", path) and not Path(out).exists()
    assert "blocks/1/mlp/up/kernel" in command("inspect", str(world.source))
    said = command("run", path)
    for part in ("accuracy  ", "95 % interval", "report.html", "jaxtransfer predict"):
        assert part in said, part
    assert "loss" in command("evaluate", out)
    said = command("predict", out, "--text", "the lamp was good good good")
    assert json.loads(said)["label"] == "positive"
    assert "model-hf" in command("export", out)
    assert "holds this run, finished" in command("resume", out)
    assert "holds this run, finished" in command("run", path)


def test_the_exported_model_is_what_transformers_reads(world, tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert cli.main(["run", written(world, tmp_path)]) == 0
    capsys.readouterr()
    assert cli.main(["predict", str(tmp_path / "out"), "--text", "a dull dull dull book"]) == 0
    ours = json.loads(capsys.readouterr().out)
    kind = transformers.AutoModelForSequenceClassification
    model, info = kind.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    with torch.no_grad():
        logits = model(**tokens("a dull dull dull book", return_tensors="pt")).logits[0]
    index = int(logits.argmax())
    assert model.config.id2label[index] == ours["label"]
    assert float(logits.softmax(-1)[index]) == pytest.approx(ours["probability"], rel=1e-5)


HALTS = [
    pytest.param("make_step", 1, signal.SIGINT, id="compiling"),
    pytest.param("make_step", 6, signal.SIGTERM, id="training", marks=pytest.mark.slow),
    pytest.param("make_eval", 1, signal.SIGTERM, id="evaluating"),
    pytest.param("make_eval", 5, signal.SIGINT, id="measuring", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("what", "call", "signum"), HALTS)
def test_a_signal_saves_and_has_its_code_and_resume_goes_on(what, call, signum, world, undisturbed, tmp_path, capsys):
    path, out = written(world, tmp_path), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        during(patch, call, what, signum)
        assert cli.main(["run", path]) == 128 + signum
    assert capsys.readouterr().err == (
        f"jaxtransfer: error: stopped by {signum.name}; the state is saved, `jaxtransfer resume` goes on\n"
    )
    assert checkpoint.latest(out / "checkpoints") == {"make_step": call, "make_eval": 4 if call < 3 else 8}[what]
    assert not (out / "run.lock").exists()
    assert cli.main(["resume", str(out)]) == 0
    assert outcome(out) == undisturbed


def test_a_second_signal_leaves_at_once(world, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as forced:
        during(patch, 6, times=2)
        cli.main(["run", written(world, tmp_path)])
    assert forced.value.code == 143
    assert checkpoint.steps(tmp_path / "out" / "checkpoints") == [4]
    assert signal.getsignal(signal.SIGTERM) == before


def start(*words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtransfer", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_for(process, happened):
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def test_a_terminated_process_ends_with_143_and_another_finishes_its_run(world, tmp_path):
    """200 steps in two processes, and in one: the same events, the same metrics."""
    changes = {"run": {"steps": 200, "log_every": 1, "evaluate_every": 100, "checkpoint_every": 100}}
    process = start("run", written(world, tmp_path, **changes))
    events = tmp_path / "out" / "metrics.jsonl"
    wait_for(process, lambda: events.exists() and events.read_text().count("\n") > 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err == "jaxtransfer: error: stopped by SIGTERM; the state is saved, `jaxtransfer resume` goes on\n"
    at = checkpoint.latest(tmp_path / "out" / "checkpoints")
    assert at is not None and 3 < at < 200
    assert cli.main(["resume", str(tmp_path / "out")]) == 0
    (tmp_path / "whole").mkdir()
    assert cli.main(["run", written(world, tmp_path / "whole", **changes)]) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_is_obeyed(signum, world, undisturbed, tmp_path):
    """From start-up to report: the code is the signal's, or the run was done; it finishes as if undisturbed."""
    process = start("run", written(world, tmp_path))
    began = time.monotonic()
    assert process.wait() == 0, process.communicate()
    seconds = time.monotonic() - began
    process.communicate()
    codes = []
    for i in range(8):
        folder = tmp_path / str(i)
        folder.mkdir()
        path = written(world, folder)
        process = start("run", path)
        time.sleep(seconds * (i + 0.5) / 8)
        process.send_signal(signum)
        process.communicate(timeout=60)
        codes.append(process.returncode)
        assert process.returncode in (0, 128 + signum, -signum), i
        assert cli.main(["run", path]) == 0
        assert outcome(folder / "out") == undisturbed, i
    assert 128 + signum in codes


@pytest.mark.slow
def test_a_killed_process_loses_at_most_what_was_not_saved(world, undisturbed, tmp_path):
    path, out = written(world, tmp_path, run__checkpoint_every=1), tmp_path / "out"
    process = start("run", path)
    wait_for(process, lambda: len(checkpoint.steps(out / "checkpoints")) > 1)
    process.kill()
    process.communicate()
    assert cli.main(["run", path]) == 0
    assert outcome(out) == undisturbed


@pytest.mark.slow
def test_the_vision_demo_in_short(tmp_path, capsys):
    """A trunk of a few steps, one budget and one seed: all of the files, not the numbers of the recipe's head."""
    pytest.importorskip("sklearn")
    out = tmp_path / "demo"
    short = ["--pretrain.run.steps", "60", "--run.steps", "20", "--study.seeds", "[0]", "--study.budgets", "[5, 50]"]
    path = str(ROOT / "configs" / "demo-vision.yaml")
    assert (
        cli.main(["run", path, "--out", str(out), "--source.ref", str(ROOT / "configs/models/digits-vit.json"), *short])
        == 0
    )
    assert "labels needed" in capsys.readouterr().out
    page = json.loads((out / "result.json").read_text())
    assert [point["budget"] for point in page["curve"]["points"]] == [5, 50]
    assert page["wrong"][0]["image"].startswith("data:image/png;base64,")
    assert "Labels needed" in (out / "report.html").read_text()


@pytest.mark.data
def test_the_recipe_of_x_rays_fits_its_weights_and_its_images(data_root, monkeypatch, capsys):
    monkeypatch.setenv("JAXTRANSFER_DATA", str(data_root))
    monkeypatch.chdir(ROOT)
    assert cli.main(["explain", str(ROOT / "configs" / "pneumonia.yaml")]) == 0
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line}
    assert (rows["head"], rows["trunk"], rows["stats"][0]) == (["2", "130"], ["57", "269,072"], "57")


@pytest.mark.slow
def test_the_demo_in_short(minilm, tmp_path, capsys):
    """The real weights on the packaged reviews, without the study."""
    path = str(ROOT / "configs" / "demo.yaml")
    out = str(tmp_path / "demo")
    assert cli.main(["run", path, "--out", out, "--study", "null"]) == 0
    page = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert page["metrics"]["test"]["accuracy"]["low"] > 0.5  # better than chance
    capsys.readouterr()
    assert cli.main(["predict", out, "--text", "It broke after a day.", "--text", "Lovely, I use it daily."]) == 0
    found = [json.loads(line)["probability"] for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2 and min(found) >= 0.5
