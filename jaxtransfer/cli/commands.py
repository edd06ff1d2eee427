"""Commands: each reads its options into one call of ``job``, and shows what comes back."""

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtransfer import config
from jaxtransfer.cli.arguments import UsageError
from jaxtransfer.cli.tables import lines_and_tabs, plain, show
from jaxtransfer.data.sources import DataError


def run(options: Namespace) -> None:
    """Train, evaluate, report and export; with ``--sweep``, for every combination of some values."""
    console = _console()
    if given := getattr(options, "sweep", None):
        job = _job()
        axes = job.parse_axes(given)
        show(job.sweep(Path(options.config), options.overrides, axes, console=console), console)
        return
    show(_job().run(config.load(options.config, options.overrides), console=console), console)


def explain(options: Namespace) -> None:
    """Show the groups of parameters, the adapters, and what is packed."""
    show(_job().explain(config.load(options.config, options.overrides)), _console())


def plan(options: Namespace) -> None:
    """Show what a step would hold, do and send on a slice."""
    if options.to and not options.search:
        raise UsageError("--to: is where --search writes what it finds")
    found, to, console = config.load(options.config, options.overrides), options.to, _console()
    how = {"search": options.search, "to": Path(to) if to else None, "say": console.print}
    show(_job().plan(found, options.topology, **how), console)


def rank(options: Namespace) -> None:
    """Show how well sources, and their layers, suit a task."""
    found, to, console = config.load(options.config, options.overrides), options.to, _console()
    how = {"layers": options.layers, "to": Path(to) if to else None, "say": console.print}
    show(_job().rank(found, options.sources, **how), console)


def inspect(options: Namespace) -> None:
    """Show a source."""
    rules = config.load(options.rules).adapt.rules if options.rules else ()
    if options.rules and not rules:
        raise UsageError(f"--rules: {options.rules} has no adapt.rules")
    show(_job().inspect(options.ref, rules=rules, revision=options.revision), _console())


def evaluate(options: Namespace) -> None:
    """Measure a run's model."""
    show(_job().evaluate(Path(options.run), data=options.data), _console())


_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def predict(options: Namespace) -> None:
    """Classify texts or images, or go on with texts; what comes is printed as it comes."""
    job, folder = _job(), Path(options.run)
    task = job.task_of(folder)
    sampling = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    if task != "causal-lm" and sampling:
        raise UsageError(f"--{next(iter(sampling)).replace('_', '-')}: is for causal-lm, {folder} is a run of {task}")
    if (options.image is not None) != (task == "image-classification"):
        given, wanted = ("--image", "--text, --file or -") if options.image is not None else ("texts", "--image")
        raise UsageError(f"{given}: {folder} is a run of {task}, which takes {wanted}")
    if options.context is not None and task != "question-answering":
        raise UsageError(f"--context: is for question-answering, {folder} is a run of {task}")
    inputs = options.image or options.text or _lines(options.file or options.stdin)
    if task == "causal-lm":
        for prompt in inputs:
            for piece in job.complete(folder, prompt, **sampling):
                print(lines_and_tabs(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            print(flush=True)
        return
    _tell(job.predict(folder, inputs, **({} if options.context is None else {"context": options.context})))


def zero_shot(options: Namespace) -> None:
    """Classify texts by labels that the source was shown no example of."""
    texts = options.text or _lines(options.file)
    how = {name: getattr(options, name) for name in ("template", "multi_label", "revision")}
    _tell(_job().zero_shot(options.ref, texts, options.labels, **how))


def export(options: Namespace) -> None:
    """Write a run's model."""
    out = Path(options.to) if options.to else None
    show({"exported": _job().export(Path(options.run), out, format=options.format)}, _console())


def merge(options: Namespace) -> None:
    """Write a run's model with its adapters folded in."""
    out = Path(options.to) if options.to else None
    show(_job().merge(Path(options.run), out, dequantize=options.dequantize), _console())


def resume(options: Namespace) -> None:
    """Go on with a run."""
    console = _console()
    show(_job().resume(Path(options.run), console=console), console)


def launch(options: Namespace) -> None:
    """Start the processes of a run and watch them, or be one of them."""
    config.load(options.config, options.overrides)  # a mistake in it is told once
    if options.processes is None:
        if options.devices_per_process is not None:
            raise UsageError("--devices-per-process: is for the processes that --processes starts")
        _job().join(timeout=options.timeout)
        run(options)
        return
    given = [f"--{key}={value}" for key, value in options.overrides]
    arguments = ["launch", options.config, *given, f"--timeout={options.timeout}"]
    arguments += ["--debug"] if getattr(options, "debug", False) else []
    _job().launch(arguments, processes=options.processes, devices=options.devices_per_process)


COMMANDS: Mapping[str, Callable[[Namespace], None]] = {
    "run": run,
    "explain": explain,
    "rank": rank,
    "inspect": inspect,
    "evaluate": evaluate,
    "predict": predict,
    "zero-shot": zero_shot,
    "export": export,
    "merge": merge,
    "resume": resume,
    "launch": launch,
    "plan": plan,
}


def _job() -> Any:
    """The room that does the work, and imports all that it needs, only once a command is understood."""
    return importlib.import_module("jaxtransfer.job")


def _tell(predictions: Iterable[Mapping[str, Any]]) -> None:
    """Predictions as a table at a terminal, as JSON lines elsewhere, each as it comes."""
    if sys.stdout.isatty():
        found, console = list(predictions), _console()
        if any(isinstance(value, list) for row in found for value in row.values()):  # each a table of its own
            for number, prediction in enumerate(found):
                if number:
                    console.print()
                show(prediction, console)
        else:
            show(found, console)
        return
    for prediction in predictions:
        print(json.dumps(plain(prediction), ensure_ascii=False), flush=True)


def _console() -> Any:
    from rich.console import Console

    # In a file or a pipe a table is as wide as it needs to be.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 1000)


def _lines(name: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input for ``-``; only a line feed ends one."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    if blank := [i for i, line in enumerate(lines, 1) if not line.strip()]:
        raise DataError(f"{name}, line {blank[0]}: is empty; every line is a text")
    return [line.removesuffix("\r") for line in lines]
