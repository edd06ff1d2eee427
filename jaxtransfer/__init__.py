"""Adapt a pre-trained checkpoint with pure functions over a parameter pytree, and know whether the transfer helped."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxtransfer.adapt import adapters as adapters
from jaxtransfer.adapt import attach as attach
from jaxtransfer.adapt import blend as blend
from jaxtransfer.adapt import groups as groups
from jaxtransfer.adapt import heads as heads
from jaxtransfer.adapt import merge as merge
from jaxtransfer.adapt import quantize as quantize
from jaxtransfer.adapt import resize as resize
from jaxtransfer.adapt import subtrees as subtrees
from jaxtransfer.adapt import swap_head as swap_head
from jaxtransfer.adapt import untie as untie
from jaxtransfer.models import apply as apply
from jaxtransfer.models import from_equinox as from_equinox
from jaxtransfer.models import from_function as from_function
from jaxtransfer.models import from_linen as from_linen
from jaxtransfer.models import from_nnx as from_nnx
from jaxtransfer.models import init as init
from jaxtransfer.models import run_span as run_span
from jaxtransfer.optim import Group as Group
from jaxtransfer.optim import explain as explain
from jaxtransfer.optim import optimizer as optimizer
from jaxtransfer.parallel import make_mesh as make_mesh
from jaxtransfer.parallel import place as place
from jaxtransfer.step import init_state as init_state
from jaxtransfer.step import make_eval as make_eval
from jaxtransfer.step import make_step as make_step
from jaxtransfer.step import params_of as params_of
from jaxtransfer.tree import combine as combine
from jaxtransfer.tree import layout as layout
from jaxtransfer.tree import match as match
from jaxtransfer.tree import partition as partition
from jaxtransfer.tree import stack as stack
from jaxtransfer.tree import unstack as unstack
from jaxtransfer.types import Head as Head
from jaxtransfer.types import Lineage as Lineage
from jaxtransfer.types import Model as Model
from jaxtransfer.types import Source as Source
from jaxtransfer.types import Stage as Stage
from jaxtransfer.types import State as State
from jaxtransfer.types import View as View

if TYPE_CHECKING:
    from jaxtransfer import fewshot as fewshot
    from jaxtransfer import probes as probes
    from jaxtransfer import scores as scores
    from jaxtransfer.checkpoint import Checkpointer as Checkpointer
    from jaxtransfer.checkpoint import restore as restore
    from jaxtransfer.checkpoint import save as save
    from jaxtransfer.features import extract as extract
    from jaxtransfer.generation import generate as generate
    from jaxtransfer.phases import next_phase as next_phase
    from jaxtransfer.run import fit as fit
    from jaxtransfer.source import export as export
    from jaxtransfer.source import load as load
    from jaxtransfer.source import load_adapter as load_adapter
    from jaxtransfer.sweeps import sweep as sweep

_LATER = {
    "fewshot": "",
    "probes": "",
    "scores": "",
    "extract": "features",
    "next_phase": "phases",
    "sweep": "sweeps",
    "Checkpointer": "checkpoint",
    "restore": "checkpoint",
    "save": "checkpoint",
    "generate": "generation",
    "fit": "run",
    "export": "source",
    "load": "source",
    "load_adapter": "source",
}
"""Name -> the room that it is in, or nothing for a room itself."""


def __getattr__(name: str) -> Any:
    """What not every program needs is imported when it is first named."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(f"{__name__}.{_LATER[name] or name}")
    return getattr(room, name) if _LATER[name] else room


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
