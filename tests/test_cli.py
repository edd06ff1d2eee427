"""The command line: arguments into calls, results into text, errors into one line and an exit code."""

import ast
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtransfer import cli
from jaxtransfer.checkpoint.lock import RunFolderError
from jaxtransfer.cli import arguments, commands
from jaxtransfer.cli.tables import cell, escape, show
from jaxtransfer.config import Config, ConfigError
from jaxtransfer.data.sources import DataError
from jaxtransfer.run import DivergenceError, Interrupted
from jaxtransfer.source import SafetensorsError, SourceError
from jaxtransfer.tree import RuleError, TreeError

PACKAGE = Path(cli.__file__).parent.parent
CONFIG = "source: {ref: a}\ndata: {train: {path: x}}\nrun: {epochs: 1}\nadapt: {train: rules, rules: [[a, b]]}\n"


@pytest.fixture
def job(monkeypatch):
    """Stands for the room that does the work: records the calls, returns or raises what a test wants."""
    calls = []
    result = SimpleNamespace(value={"accuracy": 0.5}, task="text-classification")

    def answer(name):
        def call(*args, **keywords):
            calls.append((name, args, {key: item for key, item in keywords.items() if key != "console"}))
            assert ("console" in keywords) == (name in ("run", "resume"))
            if isinstance(result.value, BaseException):
                raise result.value
            return result.value

        return call

    names = ("run", "resume", "explain", "inspect", "evaluate", "predict", "complete", "export", "merge", "zero_shot")
    room = SimpleNamespace(**{name: answer(name) for name in names}, task_of=lambda folder: result.task)
    monkeypatch.setattr(commands, "_job", lambda: room)
    return SimpleNamespace(calls=calls, result=result)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_run_and_explain_read_overrides_anywhere(job, config, capsys):
    for name in ("run", "explain"):
        assert cli.main([name, "--optimizer.lr", "1e-3", config, "--out", "somewhere", "--run.epochs=2"]) == 0
        called, (found,), keywords = job.calls.pop()
        assert (called, keywords) == (name, {})
        assert isinstance(found, Config)
        assert (found.optimizer.lr, found.out, found.run.epochs) == (1e-3, "somewhere", 2)
    assert capsys.readouterr().out == "accuracy  0.5\n" * 2


CALLS = {
    "resume runs/x": ("resume", (Path("runs/x"),), {}),
    "evaluate runs/x": ("evaluate", (Path("runs/x"),), {"data": None}),
    "evaluate runs/x --data y.csv": ("evaluate", (Path("runs/x"),), {"data": "y.csv"}),
    "inspect a/b --revision main": ("inspect", ("a/b",), {"rules": (), "revision": "main"}),
    "inspect a/b --rules CONFIG": ("inspect", ("a/b",), {"rules": (("a", "b"),), "revision": None}),
    "export runs/x": ("export", (Path("runs/x"), None), {"format": "hf"}),
    "export runs/x --to y --format orbax": ("export", (Path("runs/x"), Path("y")), {"format": "orbax"}),
    "export runs/x --format peft": ("export", (Path("runs/x"), None), {"format": "peft"}),
    "merge runs/x": ("merge", (Path("runs/x"), None), {"dequantize": False}),
    "merge runs/x --to y --dequantize": ("merge", (Path("runs/x"), Path("y")), {"dequantize": True}),
    "--debug evaluate runs/x": ("evaluate", (Path("runs/x"),), {"data": None}),
    "evaluate runs/x --debug": ("evaluate", (Path("runs/x"),), {"data": None}),
}


@pytest.mark.parametrize("line", CALLS)
def test_commands_call_the_job(line, job, config):
    assert cli.main([config if word == "CONFIG" else word for word in line.split()]) == 0
    assert job.calls == [CALLS[line]]


def test_predict_prints_json_lines(job, capsys):
    job.result.value = [{"text": "é\x1b[0m", "label": "good", "probability": np.float32(0.5)}, {"text": "b"}]
    assert cli.main(["predict", "runs/x", "--text", "é", "--text", "b"]) == 0
    assert job.calls == [("predict", (Path("runs/x"), ["é", "b"]), {})]
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "é\x1b[0m", "label": "good", "probability": 0.5},
        {"text": "b"},
    ]


def test_predict_prints_a_table_at_a_terminal(job, capsys, monkeypatch):
    job.result.value = [{"text": "a\x1b[31m", "label": "good", "probability": 0.98765}]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["predict", "runs/x", "--text", "a"]) == 0
    out = capsys.readouterr().out
    assert "probability" in out
    assert "0.9877" in out
    assert r"a\x1b[31m" in out


def test_predict_reads_a_file_and_standard_input(job, tmp_path, monkeypatch):
    data = "one\r\ntwo\x85still two\n".encode()
    (tmp_path / "texts").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    job.result.value = []
    assert cli.main(["predict", "runs/x", "--file", str(tmp_path / "texts")]) == 0
    assert cli.main(["predict", "runs/x", "-"]) == 0
    assert [args[1] for _, args, _ in job.calls] == [["one", "two\x85still two"]] * 2


def test_zero_shot_takes_labels_and_texts(job, tmp_path, capsys):
    job.result.value = [{"text": "a", "label": "x y", "similarity": 0.5}]
    (tmp_path / "texts").write_text("a\nb\n")
    options = {"template": None, "multi_label": False, "revision": None}
    assert cli.main(["zero-shot", "s", "--labels", "x y", "z", "--text", "a", "--text", "b"]) == 0
    assert json.loads(capsys.readouterr().out) == job.result.value[0]
    more = ["--file", str(tmp_path / "texts"), "--multi-label", "--template", "On {}."]
    assert cli.main(["zero-shot", "s", "--labels", "x y", "z", *more]) == 0
    called = ("s", ["a", "b"], ["x y", "z"])
    changed = {**options, "template": "On {}.", "multi_label": True}
    assert job.calls == [("zero_shot", called, options), ("zero_shot", called, changed)]


def test_predict_takes_images_of_a_run_of_images(job, capsys):
    job.result.task, job.result.value = "image-classification", [{"image": "a.png", "label": "cat"}]
    assert cli.main(["predict", "runs/x", "--image", "a.png", "b.png"]) == 0
    assert job.calls == [("predict", (Path("runs/x"), ["a.png", "b.png"]), {})]
    assert json.loads(capsys.readouterr().out) == {"image": "a.png", "label": "cat"}
    assert cli.main(["predict", "runs/x", "--text", "a.png"]) == 2
    assert "texts: runs/x is a run of image-classification, which takes --image" in capsys.readouterr().err


def test_predict_goes_on_with_texts_piece_by_piece(job, capsys, monkeypatch):
    job.result.task, job.result.value = "causal-lm", ["def f(", "x):\n\treturn", "\x1b[2J"]
    words = "--max-new-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 1".split()
    assert cli.main(["predict", "runs/x", "--text", "a", "--text", "b", *words]) == 0
    sampling = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 1}
    assert job.calls == [("complete", (Path("runs/x"), text), sampling) for text in "ab"]
    assert capsys.readouterr().out == "def f(x):\n\treturn\x1b[2J\n" * 2
    job.calls.clear()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["predict", "runs/x", "--text", "a"]) == 0
    assert job.calls == [("complete", (Path("runs/x"), "a"), {})]
    assert capsys.readouterr().out == "def f(x):\n\treturn\\x1b[2J\n"


TEXTS = {
    b"a\n\nb\n": "line 2: is empty",
    b"": "line 1: is empty",
    b"ab\xff": "not UTF-8: byte 0xff at 2",
    None: "cannot be read: No such file or directory",
}


@pytest.mark.parametrize("data", TEXTS)
def test_predict_refuses_what_is_no_text(data, job, tmp_path, capsys):
    if data is not None:
        (tmp_path / "texts").write_bytes(data)
    assert cli.main(["predict", "runs/x", "--file", str(tmp_path / "texts")]) == 3
    assert TEXTS[data] in capsys.readouterr().err
    assert job.calls == []


USAGE = {
    "": "the following arguments are required: COMMAND",
    "rnu x": "invalid choice: 'rnu'",
    "run": "the following arguments are required: CONFIG",
    "run CONFIG --optimizer.lr": "--optimizer.lr: needs a value",
    "run CONFIG --optimizer.lr --out x": "--optimizer.lr: needs a value",
    "run CONFIG --optimizer.lrr 1": "--optimizer.lrr: unknown key; did you mean 'lr'?",
    "run CONFIG --optimizzer.lr 1": "--optimizzer: unknown key; did you mean 'optimizer'?",
    "run CONFIG --seed 1": "unrecognized arguments: --seed 1",
    "run CONFIG --deb": "unrecognized arguments: --deb",
    "run none.yaml": "none.yaml: cannot be read: No such file or directory",
    "evaluate x --optimizer.lr 1": "unrecognized arguments: --optimizer.lr 1",
    "predict x": "one of the arguments --text --file --image - is required",
    "predict x --text a --file b": "not allowed with argument --text",
    "predict x y": "invalid choice: 'y'",
    "predict x --image a --text b": "not allowed with argument --image",
    "predict x --image a.png b.png": "--image: x is a run of text-classification, which takes --text, --file or -",
    "predict x --text a --top-k 5": "--top-k: is for causal-lm, x is a run of text-classification",
    "predict x --text a --max-new-tokens many": "argument --max-new-tokens: invalid int value: 'many'",
    "zero-shot x --labels a b": "one of the arguments --text --file is required",
    "zero-shot x --text a": "the following arguments are required: --labels",
    "export x --format onnx": "invalid choice: 'onnx'",
    "inspect a --rules PLAIN": "has no adapt.rules",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage_is_one_line(line, job, config, tmp_path, capsys):
    plain = tmp_path / "plain.yaml"
    plain.write_text(CONFIG.partition("adapt")[0])
    words = {"CONFIG": config, "PLAIN": str(plain)}
    assert cli.main([words.get(word, word) for word in line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxtransfer: error: ")
    assert err.count("\n") == 1
    assert USAGE[line] in err
    assert job.calls == []


class OddError(SourceError):
    """A kind of a known kind."""


CODES = [
    (ConfigError("c"), 2, "c"),
    (DataError("d"), 3, "d"),
    (SourceError("s"), 4, "s"),
    (OddError("o"), 4, "o"),
    (SafetensorsError("s"), 4, "s"),
    (TreeError("t"), 4, "t"),
    (RuleError("r"), 4, "r"),
    (RunFolderError("r"), 4, "r"),
    (DivergenceError("n"), 5, "n"),
    (OSError(28, "No space left on device", "runs/x"), 1, "[Errno 28] No space left on device: 'runs/x'"),
    (KeyError("k"), 1, "unexpected KeyError: 'k'; --debug shows where"),
    (ValueError(), 1, "unexpected ValueError: no message; --debug shows where"),
    (ConfigError("two\n  lines \x1b[2J\u202e"), 2, r"two lines \x1b[2J\u202e"),
    (SourceError("https://me:pass@host/x with hf_abcdefghijklmnop"), 4, "https://***@host/x with ***"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (Interrupted(signal.SIGINT), 130, "stopped by SIGINT; the state is saved, `jaxtransfer resume` goes on"),
    (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; the state is saved, `jaxtransfer resume` goes on"),
]


@pytest.mark.parametrize(("error", "code", "line"), CODES, ids=lambda value: type(value).__name__)
def test_exit_codes(error, code, line, job, capsys):
    job.result.value = error
    assert cli.main(["evaluate", "runs/x"]) == code
    assert capsys.readouterr().err == f"jaxtransfer: error: {line}\n"
    assert f"\n  {code} " in arguments.EXIT_CODES


def test_only_debug_shows_the_traceback_and_no_secret(job, capsys):
    job.result.value = KeyError("hf_abcdefghijklmnop")
    assert cli.main(["evaluate", "runs/x"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["evaluate", "runs/x", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "KeyError" in err
    assert "hf_" not in err


def test_every_error_of_the_package_has_a_code_or_a_reason():
    inner = {
        "StudyError": "numbers of the package's own",
        "RecordError": "a record that the package wrote",
        "ReportError": "an OSError: the disk",
        "ForeignError": "for models handed over in Python",
        "SweepError": "for states handed over in Python",
    }
    found = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    parents = {"DamagedError", "ImageError"}  # derived from one that has a code
    builtin = {"KeyboardInterrupt", "BrokenPipeError"}
    assert found - parents - inner.keys() == cli._CODES.keys() - builtin


def test_help_tells_codes_and_keys(capsys):
    for argv, expected in ((["--help"], arguments.EXIT_CODES), (["run", "--help"], "--optimizer.lr")):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jaxtransfer ")


@dataclass(frozen=True)
class Record:
    ref: str
    bytes: int
    hidden: dict = field(default_factory=dict, repr=False)


def test_tables_are_aligned_and_safe(capsys):
    rows = [{"path": "a/b\n", "shape": (2, 3), "own_bytes": 24}, {"path": "c", "shape": (), "own_bytes": 1 << 20}]
    value = {
        "lineage": Record("x", 5, {"secret": "no"}),
        "parameters": rows,
        "accuracy": {"value": 0.91234, "low": 0.9, "high": np.float64(0.95), "n": 100},
        "the_report": Path("runs/report.html"),
        "none": [],
    }
    show(value, commands._console())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "accuracy    0.9123 [0.9, 0.95]",
        "the_report  runs/report.html",
        "none        -",
        "",
        "lineage",
        "ref    x",
        "bytes  5 B",
        "",
        "parameters",
        "path   shape   own bytes",
        "a/b\\n  2 x 3        24 B",
        "c      scalar    1.0 MiB",
    ]


def test_markup_and_styles_of_others_are_text(capsys):
    show({"[bold]x[/bold]": "[red]y[/red] :smile:"}, commands._console())
    assert capsys.readouterr().out == "[bold]x[/bold]  [red]y[/red] :smile:\n"


def test_cells():
    assert cell("n", True) == "yes"
    assert cell("n", None) == "-"
    assert cell("n", 1234567) == "1,234,567"
    assert [cell("bytes", n) for n in (0, 1023, 1024, 3 << 40)] == ["0 B", "1023 B", "1.0 KiB", "3.0 TiB"]
    assert escape("tab\t bell\x07 del\x7f csi\x9b fine é") == r"tab\t bell\x07 del\x7f csi\x9b fine é"


def test_the_process_ends_with_the_code_and_survives_a_closed_pipe(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "jaxtransfer"]
    wrong = subprocess.run([*command, "run", "none.yaml"], env=environment, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "jaxtransfer: error: none.yaml: cannot be read: No such file or directory\n"
    program = (
        "import sys; from types import SimpleNamespace\n"
        "from jaxtransfer import cli; from jaxtransfer.cli import commands\n"
        "rows = ({'text': 'x' * 1000} for _ in range(100_000))\n"
        "commands._job = lambda: SimpleNamespace(predict=lambda *_: rows, task_of=lambda _: 'text-classification')\n"
        "sys.exit(cli.main(['predict', 'runs/x', '--text', 'a']))"
    )
    read, write = os.pipe()
    os.close(read)
    piped = subprocess.run([sys.executable, "-c", program], env=environment, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (piped.returncode, piped.stderr) == (141, b"")
