"""Plans: a step compiled for devices that are not here; what it would hold, compute and send."""

from jaxtransfer.plan.advice import advice as advice
from jaxtransfer.plan.chips import CHIPS as CHIPS
from jaxtransfer.plan.chips import Chip as Chip
from jaxtransfer.plan.chips import Topology as Topology
from jaxtransfer.plan.chips import TopologyError as TopologyError
from jaxtransfer.plan.chips import devices as devices
from jaxtransfer.plan.chips import topology as topology
from jaxtransfer.plan.compiled import Compiled as Compiled
from jaxtransfer.plan.compiled import bounds as bounds
from jaxtransfer.plan.compiled import compiled as compiled
from jaxtransfer.plan.compiled import memory as memory
from jaxtransfer.plan.compiled import sent as sent
from jaxtransfer.plan.estimate import Estimate as Estimate
from jaxtransfer.plan.estimate import estimate as estimate
from jaxtransfer.plan.estimate import trace as trace
from jaxtransfer.plan.flops import count as count
from jaxtransfer.plan.flops import flops as flops
from jaxtransfer.plan.held import Blueprint as Blueprint
from jaxtransfer.plan.held import blueprint as blueprint
