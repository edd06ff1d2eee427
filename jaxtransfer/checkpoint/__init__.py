"""Checkpoints: what differs from the source and the source by its digest, verified to the byte, onto any mesh."""

from jaxtransfer.checkpoint.keeper import Checkpointer as Checkpointer
from jaxtransfer.checkpoint.lock import RunFolderError as RunFolderError
from jaxtransfer.checkpoint.lock import RunLock as RunLock
from jaxtransfer.checkpoint.lock import claim as claim
from jaxtransfer.checkpoint.manifest import CheckpointError as CheckpointError
from jaxtransfer.checkpoint.manifest import DamagedError as DamagedError
from jaxtransfer.checkpoint.manifest import latest as latest
from jaxtransfer.checkpoint.manifest import steps as steps
from jaxtransfer.checkpoint.manifest import verify as verify
from jaxtransfer.checkpoint.reading import metadata as metadata
from jaxtransfer.checkpoint.reading import restore as restore
from jaxtransfer.checkpoint.store import save as save
