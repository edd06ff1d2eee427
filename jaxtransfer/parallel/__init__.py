"""Meshes and sharding rules."""

from jaxtransfer.parallel.mesh import BATCH_AXES as BATCH_AXES
from jaxtransfer.parallel.mesh import make_mesh as make_mesh
from jaxtransfer.parallel.specs import ShardingError as ShardingError
from jaxtransfer.parallel.specs import fsdp as fsdp
from jaxtransfer.parallel.specs import gather as gather
from jaxtransfer.parallel.specs import place as place
from jaxtransfer.parallel.specs import shardings as shardings
from jaxtransfer.parallel.specs import state_shardings as state_shardings
