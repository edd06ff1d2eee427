"""Adapting: heads, shapes, adapters, quantised weights, weight algebra, and recipes for what trains."""

from jaxtransfer.adapt import adapters as adapters
from jaxtransfer.adapt import blend as blend
from jaxtransfer.adapt import groups as groups
from jaxtransfer.adapt import heads as heads
from jaxtransfer.adapt import resize as resize
from jaxtransfer.adapt import subtrees as subtrees
from jaxtransfer.adapt.attaching import attach as attach
from jaxtransfer.adapt.attaching import merge as merge
from jaxtransfer.adapt.heads import swap_head as swap_head
from jaxtransfer.adapt.heads import untie as untie
from jaxtransfer.adapt.quantized import quantize as quantize
