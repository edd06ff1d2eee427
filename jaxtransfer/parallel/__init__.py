"""Meshes, sharding rules, and several processes as one."""

from jaxtransfer.parallel.distributed import ProcessError as ProcessError
from jaxtransfer.parallel.distributed import join as join
from jaxtransfer.parallel.distributed import put as put
from jaxtransfer.parallel.families import check_sequence as check_sequence
from jaxtransfer.parallel.families import sharding_rules as sharding_rules
from jaxtransfer.parallel.mesh import BATCH_AXES as BATCH_AXES
from jaxtransfer.parallel.mesh import SEQUENCE as SEQUENCE
from jaxtransfer.parallel.mesh import ShardingError as ShardingError
from jaxtransfer.parallel.mesh import make_mesh as make_mesh
from jaxtransfer.parallel.mesh import parts as parts
from jaxtransfer.parallel.mesh import spelled as spelled
from jaxtransfer.parallel.specs import fsdp as fsdp
from jaxtransfer.parallel.specs import gather as gather
from jaxtransfer.parallel.specs import place as place
from jaxtransfer.parallel.specs import shardings as shardings
from jaxtransfer.parallel.specs import state_shardings as state_shardings
from jaxtransfer.parallel.splash import splash as splash
