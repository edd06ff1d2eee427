"""One pass of the frozen prefix over examples, and the same examples with its output in place of what it is made of."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtransfer.data.examples import Examples
from jaxtransfer.data.loader import Loader, batches
from jaxtransfer.features.extract import ahead, by_rows
from jaxtransfer.features.prefix import Prefix
from jaxtransfer.features.store import Kept, Store
from jaxtransfer.parallel import BATCH_AXES, gather
from jaxtransfer.parallel.agreement import gathered, together
from jaxtransfer.parallel.distributed import in_step, share
from jaxtransfer.tree.fingerprint import fingerprint
from jaxtransfer.tree.paths import Params, flatten
from jaxtransfer.tree.rules import Rules
from jaxtransfer.tree.stacks import layers_of

_COMPLETE = 2**62  # rows: of a process that has none to make


@dataclasses.dataclass(frozen=True)
class Pass:
    """How the prefix runs over data.

    Attributes:
      prefix: what runs, and what is kept.
      params: its parameters, laid out and placed; those of later stages may be None.
      batch, buckets: of `data.batches`.
      mesh, sharding: where the parameters lie.
      forward: from `forward`, to be compiled once for several passes.
    """

    prefix: Prefix
    params: Params
    batch: int
    buckets: tuple[int, ...] = ()
    mesh: Mesh | None = None
    sharding: Rules = ()
    forward: Callable[..., Any] | None = None

    def store(self, examples: Examples, folder: Path | None) -> Store:
        """Where the rows of some examples go, with what is there already.

        Args:
          examples: N of them.
          folder: of files, which all processes see; None is memory, for one process alone.
        """
        index, count = share(self.mesh)
        plan, rows = self._loader(examples, 0, 1), self.batch // count
        found = [plan.members(i).reshape(count, rows) for i in range(plan.steps_per_epoch)]
        parts = [np.concatenate([part[i][part[i] >= 0] for part in found]) for i in range(count)]
        shares = gathered("features", str(index))  # of one part, where its tensors are split, several processes have
        writes = shares.index(str(index)) == jax.process_index()
        key = self.identity(examples)
        return Store(
            self.prefix.entries, examples.lengths, parts, own=index if writes else None, folder=folder, key=key
        )

    def fill(self, store: Store, examples: Examples, check: Callable[[], None] = lambda: None) -> None:
        """Makes the rows that are not there yet; ``check`` is called before each batch.

        Raises:
          FeatureError: the disk is full.
        """
        loader, lengths = self._loader(examples, *share(self.mesh)), examples.lengths
        ends = np.cumsum([0, *((loader.members(i) >= 0).sum() for i in range(loader.steps_per_epoch))])
        there = _COMPLETE if store.own is None else store.done
        first = min(int(found) for found in gathered("features done", str(np.searchsorted(ends, there, "right") - 1)))
        if first >= loader.steps_per_epoch:
            return
        loader.restore({**loader.state(), "position": first})
        with together("features"):
            for at, found in enumerate(self._made(loader, check), first):
                if store.own is None or ends[at + 1] <= store.done:
                    continue
                real = np.flatnonzero(loader.members(at) >= 0)[store.done - ends[at] :]
                sizes = lengths[loader.members(at)[real]]
                store.put({name: _rows(found[name], real, sizes, store.entries[name].ragged) for name in found})

    def identity(self, examples: Examples) -> str:
        """What the rows depend on: the prefix's leaves, the examples, the span and its dtype; and their order."""
        prefix = self.prefix
        names = tuple(f"{stage.name}/" for stage in prefix.model.stages[: prefix.stages])
        leaves = {path: leaf for path, leaf in flatten(self.params).items() if layers_of(path)[0].startswith(names)}
        known = {
            "leaves": fingerprint(leaves), "examples": examples.digest(), "stop": prefix.stop,
            "entries": {name: str(entry) for name, entry in prefix.entries.items()},
            "precision": str(np.dtype(prefix.precision)), "batch": self.batch, "buckets": self.buckets,
            "parts": share(self.mesh)[1],
        }  # fmt: skip
        return json.dumps(known, sort_keys=True)

    def _loader(self, examples: Examples, index: int, count: int) -> Loader:
        return batches(
            examples, batch=self.batch, buckets=self.buckets, shuffle=False, epochs=1, process_index=index,
            process_count=count,
        )  # fmt: skip

    def _made(self, loader: Loader, check: Callable[[], None]) -> Iterator[dict[str, np.ndarray]]:
        """The kept entries of this process's rows of every batch."""

        def checked() -> Iterator[Mapping[str, np.ndarray]]:
            for batch in loader:
                check()
                yield batch

        fetch = jax.device_get if self.mesh is None else partial(jax.tree.map, _local)
        run = self.forward or forward(self.prefix, mesh=self.mesh, sharding=self.sharding)
        return iter(ahead(run, self.params, checked(), self.mesh, fetch))


def forward(prefix: Prefix, *, mesh: Mesh | None = None, sharding: Rules = ()) -> Callable[..., Any]:
    """The jitted prefix: ``forward(params, batch)`` gives the kept entries, split by rows over a mesh."""

    def run(params: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        found = prefix.run(params if mesh is None else gather(params, mesh, sharding), batch, constrain=by_rows(mesh))
        return found if mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P(BATCH_AXES)))

    return in_step("features", jax.jit(run))


def kept(examples: Examples, store: Store) -> Examples:
    """The examples with a store's rows in place of their lazy fields; in the same batches, in the same order."""
    origin = "" if examples.lazy is None else examples.lazy.digest()
    return dataclasses.replace(examples, lazy=Kept(store, origin, len(examples)))


def _rows(block: np.ndarray, real: np.ndarray, lengths: np.ndarray, ragged: bool) -> list[np.ndarray]:
    """Rows of a batch, without the padding of ragged ones."""
    if not ragged:
        return [block[i] for i in real]
    return [block[i, :length] for i, length in zip(real, lengths, strict=True)]


def _local(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split by rows; of rows on several of its devices one copy."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
