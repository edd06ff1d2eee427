"""Models: stages in depth order, written in Flax NNX as notation, run as pure functions."""

from jaxtransfer.models.api import apply as apply
from jaxtransfer.models.api import init as init
from jaxtransfer.models.api import layout_of as layout_of
from jaxtransfer.models.api import run_span as run_span
from jaxtransfer.models.foreign import from_equinox as from_equinox
from jaxtransfer.models.foreign import from_function as from_function
from jaxtransfer.models.foreign import from_linen as from_linen
from jaxtransfer.models.foreign import from_nnx as from_nnx
from jaxtransfer.models.registry import ConfigFieldError as ConfigFieldError
from jaxtransfer.models.registry import families as families
from jaxtransfer.models.registry import family as family
from jaxtransfer.models.registry import register as register
