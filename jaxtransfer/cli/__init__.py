"""The command line: a thin reading of arguments into the calls of ``job``, and of what they return into tables."""

import os
import sys
import traceback
from collections.abc import Sequence

from jaxtransfer.cli.arguments import parse
from jaxtransfer.cli.commands import COMMANDS
from jaxtransfer.cli.tables import escape
from jaxtransfer.config.secrets import redact

# By name: the rooms that raise them are imported by the command that needs them, not to tell a wrong option.
_CODES = {
    "UsageError": 2,
    "ConfigError": 2,
    "ShardingError": 2,
    "TopologyError": 2,
    "GenerationError": 2,
    "DataError": 3,
    "SourceError": 4,
    "HubError": 4,
    "SafetensorsError": 4,
    "MappingError": 4,
    "ConfigFieldError": 4,
    "TreeError": 4,
    "RuleError": 4,
    "GroupError": 4,
    "AdapterError": 4,
    "QuantizeError": 4,
    "ResizeError": 4,
    "BlendError": 4,
    "FewShotError": 4,
    "PeftError": 4,
    "FeatureError": 4,
    "ScoreError": 3,
    "ProbeError": 3,
    "CheckpointError": 4,
    "RunFolderError": 4,
    "ExportError": 4,
    "DivergenceError": 5,
    "ProcessError": 6,
    "KeyboardInterrupt": 130,
    "BrokenPipeError": 141,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`arguments.EXIT_CODES`); an error is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parse(arguments)
        COMMANDS[options.command](options)
        sys.stdout.flush()
    except SystemExit:  # --help, --version, and a second signal
        raise
    except BaseException as error:  # a signal is no Exception, and has its code as well
        if isinstance(error, BrokenPipeError):
            _discard_output()
        code = fail(error, debug="--debug" in arguments)
        _leave_the_others(code)
        return code
    return 0


def fail(error: BaseException, *, debug: bool = False) -> int:
    """Reports an error on stderr, without secrets and control characters, and returns its exit code."""
    names = [kind.__name__ for kind in type(error).__mro__]
    code = next((_CODES[name] for name in names if name in _CODES), 1)
    if signum := getattr(error, "signum", None):  # a run that a signal stopped
        code = 128 + signum
    if debug:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    if code == _CODES["BrokenPipeError"]:
        return code
    message = " ".join(str(error).split()) or ("interrupted" if code == 130 else "no message")
    if signum:
        message += f"; {getattr(error, 'further', 'nothing is saved')}"
    if code == 1 and not isinstance(error, OSError):
        message = f"unexpected {names[0]}: {message}; --debug shows where"
    print(f"jaxtransfer: error: {escape(redact(message))}", file=sys.stderr)
    return code


def _leave_the_others(code: int) -> None:
    """Ends one of several processes at once: on its way out jax would wait for the others, which wait for this one."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _discard_output() -> None:
    """What Python still holds for a reader that went away would raise again when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
