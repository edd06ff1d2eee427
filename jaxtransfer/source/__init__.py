"""The source room: what comes in from checkpoints, and what goes out again."""

from jaxtransfer.source.blank import blank as blank
from jaxtransfer.source.card import CardWarning as CardWarning
from jaxtransfer.source.export import ExportError as ExportError
from jaxtransfer.source.export import export as export
from jaxtransfer.source.load import load as load
from jaxtransfer.source.peft import PeftError as PeftError
from jaxtransfer.source.peft import load_adapter as load_adapter
from jaxtransfer.source.resolve import HubError as HubError
from jaxtransfer.source.resolve import SourceError as SourceError
from jaxtransfer.source.resolve import resolve as resolve
from jaxtransfer.source.safetensors import SafetensorsError as SafetensorsError
from jaxtransfer.source.safetensors import TensorFile as TensorFile
