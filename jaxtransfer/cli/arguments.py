"""Arguments: the commands, their options, and the overrides of a configuration's keys."""

import argparse
import dataclasses
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxtransfer.config import Config, keys

EXIT_CODES = """\
exit codes:
  0    done
  1    unexpected failure; --debug shows the traceback
  2    wrong usage, or a configuration that cannot be read
  3    data that cannot be read
  4    a source, rules, or a checkpoint that does not fit
  5    stopped: too many non-finite steps in a row
  6    of several processes one did not come, or died; the message names it
  130  interrupted (SIGINT)
  141  the reader of the output went away (SIGPIPE)
  143  terminated (SIGTERM); a run has saved, and `jaxtransfer resume` goes on
"""

_CONFIGURED = ("run", "explain", "launch", "plan", "rank")  # the commands that take overrides
_OVERRIDE = re.compile(r"--(\w+(?:\.[\w-]+)*)(?:=(.*))?", re.DOTALL)


class UsageError(ValueError):
    """Arguments that the command does not take."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; ``overrides`` holds the ``--key.sub value`` pairs of `run` and `explain`.

    Raises:
      UsageError: an unknown command, option or choice, or a missing argument.
    """
    top = _Parser(
        prog="jaxtransfer",
        description="Adapt any pre-trained checkpoint to your task, and know whether the transfer helped.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=_version())
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_commands(top.add_subparsers(dest="command", metavar="COMMAND", required=True))
    rest, overrides = split_overrides(argv)
    return top.parse_args(rest, argparse.Namespace(overrides=overrides))


def _add_commands(commands: Any) -> None:
    def command(name: str, description: str, **about: Any) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=description, description=f"{description}.", allow_abbrev=False, **about)
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return parser

    for name, description in (
        ("run", "Train, evaluate, report and export"),
        ("explain", "Show what would train, and at what cost, before anything is compiled"),
    ):
        about = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _keys()}
        more = " [--sweep KEY=V1,V2,...]" if name == "run" else ""
        parser = command(name, description, usage=f"jaxtransfer {name} CONFIG{more} [--key.sub value ...]", **about)
        parser.add_argument("config", metavar="CONFIG", help="a YAML file")
        if more:
            parser.add_argument(
                "--sweep", action="append", metavar="KEY=V1,V2,...",
                help="a run for every combination of such values; KEY=0..4 is of whole numbers, seed is run.seed",
            )  # fmt: skip

    _add_launch(command)
    _add_plan(command)
    _add_rank(command)

    inspect = command("inspect", "Show a source: parameters, licence, lineage, and which rules match")
    inspect.add_argument("ref", metavar="SOURCE", help="a folder, a hub id, or python:PACKAGE/FOLDER")
    inspect.add_argument("--rules", metavar="CONFIG", help="a configuration whose adapt.rules are matched")
    inspect.add_argument("--revision", help="of a hub id")

    evaluate = command("evaluate", "Measure the model of a run on its test data, or on other data")
    evaluate.add_argument("run", metavar="RUN", help="the folder of a finished run")
    evaluate.add_argument("--data", metavar="PATH", help="a file with the columns of the run's test data")

    _add_predict(command)
    _add_zero_shot(command)

    export = command("export", "Write the model of a run for others to load")
    export.add_argument("run", metavar="RUN", help="the folder of a finished run")
    export.add_argument("--to", metavar="DIR", help="by default inside the run's folder")
    export.add_argument(
        "--format", choices=["hf", "orbax", "peft"], default="hf", help="by default hf; peft is the adapters alone"
    )

    merge = command("merge", "Fold the adapters of a run into its source, and write the one model that they make")
    merge.add_argument("run", metavar="RUN", help="the folder of a finished run")
    merge.add_argument("--to", metavar="DIR", help="by default inside the run's folder")
    merge.add_argument("--dequantize", action="store_true", help="of a quantised source, which is large again then")

    command("resume", "Go on with a run that was stopped").add_argument("run", metavar="RUN", help="its folder")


def _add_plan(command: Any) -> None:
    plan = command(
        "plan", "Compile a run's step for a slice that is not here: what it would hold, do and send",
        usage="jaxtransfer plan CONFIG --topology SLICE [--search [--to FILE]] [--key.sub value ...]",
    )  # fmt: skip
    plan.add_argument("config", metavar="CONFIG", help="a YAML file; neither weights nor data are read")
    plan.add_argument("--topology", metavar="SLICE", required=True, help="v5e:4x4, v5p:4x4x8, h200:8, ...")
    plan.add_argument("--search", action="store_true", help="try meshes, what is recomputed, and microbatches")
    plan.add_argument("--to", metavar="FILE", help="with --search: a new file for the configuration that is best")


def _add_rank(command: Any) -> None:
    rank = command(
        "rank", "Rank sources, or the layers of them, for a task: scores of their features beside a quick probe",
        usage="jaxtransfer rank CONFIG --sources A B C [--layers] [--to FILE] [--key.sub value ...]",
    )  # fmt: skip
    rank.add_argument("config", metavar="CONFIG", help="a YAML file; names the data and the task")
    rank.add_argument("--sources", nargs="+", metavar="SOURCE", required=True, help="folders, hub ids, ...")
    rank.add_argument("--layers", action="store_true", help="a row for every layer, not for the last alone")
    rank.add_argument("--to", metavar="FILE", help="a file for the result as JSON")


def _add_launch(command: Any) -> None:
    launch = command(
        "launch", "Run in several processes: those of Slurm, Cloud TPU, GKE or Open MPI, or new ones on this machine",
        usage="jaxtransfer launch [--processes N [--devices-per-process D]] CONFIG [--key.sub value ...]",
    )  # fmt: skip
    launch.add_argument("config", metavar="CONFIG", help="a YAML file; its mesh is over the devices of all processes")
    launch.add_argument("--processes", type=int, metavar="N", help="start N here; by default this is one of others")
    launch.add_argument("--devices-per-process", type=int, metavar="D", help="of a GPU machine, or simulated on a CPU")
    launch.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for all to come; default 300")


def _add_predict(command: Any) -> None:
    predict = command(
        "predict", "Classify texts or images: a table at a terminal, JSON lines otherwise; or go on with texts"
    )
    predict.add_argument("run", metavar="RUN", help="the folder of a finished run")
    inputs = predict.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    inputs.add_argument("--file", metavar="PATH", help="UTF-8, a text on each line")
    inputs.add_argument("--image", nargs="+", metavar="PATH", help="files of images")
    inputs.add_argument("stdin", nargs="?", choices=["-"], metavar="-", help="a text on each line of the input")
    predict.add_argument("--context", metavar="TEXT", help="of runs of question-answering, where texts are questions")
    going = predict.add_argument_group("of runs of causal-lm, which go on with the text")
    going.add_argument("--max-new-tokens", type=int, metavar="N", help="by default 128")
    going.add_argument("--temperature", type=float, metavar="T", help="by default 0, the likeliest token each time")
    going.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    going.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens of this probability")
    going.add_argument("--seed", type=int, metavar="N", help="of the draws; by default 0")


def _add_zero_shot(command: Any) -> None:
    zero = command("zero-shot", "Classify texts by labels of which the source was shown no example")
    zero.add_argument("ref", metavar="SOURCE", help="of natural-language inference, or an encoder of sentences")
    zero.add_argument("--labels", nargs="+", metavar="LABEL", required=True, help="words, or descriptions")
    inputs = zero.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    inputs.add_argument("--file", metavar="PATH", help="UTF-8, a text on each line; - is standard input")
    zero.add_argument("--template", metavar="WORDS", help="with {} for the label; to be entailed, 'This is {}.'")
    zero.add_argument("--multi-label", action="store_true", help="a text may have any number of the labels")
    zero.add_argument("--revision", help="of a hub id")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes the overrides out of the arguments of `run` and `explain`, wherever they stand.

    An override is an option with a dot in its name, or one named like a top-level key of the configuration.

    Raises:
      UsageError: an override without a value.

    Example:
      >>> split_overrides(["run", "--optimizer.lr", "1e-3", "demo.yaml", "--study=null", "--debug"])
      (['run', 'demo.yaml', '--debug'], [('optimizer.lr', '1e-3'), ('study', 'null')])
    """
    if next((word for word in argv if not word.startswith("-")), None) not in _CONFIGURED:
        return list(argv), []
    top = {field.name for field in dataclasses.fields(Config)}
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        found = _OVERRIDE.fullmatch(word)
        if not found or not ("." in found[1] or found[1] in top):
            rest.append(word)
            continue
        value = next(words, None) if found[2] is None else found[2]
        if value is None or (found[2] is None and value.startswith("--")):
            raise UsageError(f"--{found[1]}: needs a value, null for none; see jaxtransfer {rest[0]} --help")
        overrides.append((found[1], value))
    return rest, overrides


def _keys() -> str:
    """The keys of a configuration as an option list; what takes the same keys as another is told in words."""
    alike = ("data.validation.", "data.test.", "data.retain.", "pretrain.")
    rows = [row for row in keys() if not row[0].startswith(alike)]
    width = max(len(key) for key, _, _ in rows) + 4
    lines = [
        f"  {f'--{key}':<{width}}{kind}{'' if default is None else f'; default {default}'}"
        for key, kind, default in rows
    ]
    return "\n".join(
        [
            "every key of the configuration can be set, to YAML (quote lists: '[0, 1]'):",
            *lines,
            "adapt.adapters is a list of records, N = 0 the first, each with the keys that its method reads;",
            "data.validation, data.test and data.retain have the keys of data.train, or are null; pretrain is null or",
            "has data, task, optimizer and run with the keys of these; optimizer.groups.NAME has those of optimizer",
            "down to eps; out is by default runs/ and the name of CONFIG",
        ]
    )


def _version() -> str:
    try:
        return f"jaxtransfer {importlib.metadata.version('jaxtransfer')}"
    except importlib.metadata.PackageNotFoundError:
        return "jaxtransfer (not installed)"
