"""Adapting: heads and how to swap them, and recipes for what trains."""

from jaxtransfer.adapt import groups as groups
from jaxtransfer.adapt import heads as heads
from jaxtransfer.adapt.heads import swap_head as swap_head
from jaxtransfer.adapt.heads import untie as untie
