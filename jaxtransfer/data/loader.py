"""The loader: batches of a few static shapes in an order that depends on the seed and the position alone.

The schedule is computed from the lengths of all examples, before any process takes its rows, so all processes agree.
Batch ``i`` is a function of ``(seed, i)``: the state of a loader is its position, and resuming is exact.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError
from jaxtransfer.data.examples import Batch as Batch
from jaxtransfer.data.examples import Examples as Examples
from jaxtransfer.data.examples import collate as collate
from jaxtransfer.data.text import bucket_lengths

_ENDLESS = 2**48
THREADS = max(2, min(8, os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Which examples meet in which batch: a pure function of the seed and the epoch.

    Attributes:
      lengths: (N,) the static length of each example, its bucket.
      batch: rows of a batch over all processes.
      shuffle: a new order in every epoch, of the examples and of the batches; else by length, then by position.
      seed: of the orders.
    """

    lengths: np.ndarray
    batch: int
    shuffle: bool
    seed: int

    @property
    def steps(self) -> int:
        """Batches of an epoch: ``ceil(N / batch)``."""
        return -(-len(self.lengths) // self.batch)

    def epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The length and the examples of every batch of an epoch, in order; each example occurs once.

        What does not fill a batch of its bucket moves up to the next, so that one batch of an epoch is incomplete at
        the most, filled up with -1.
        """
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        plan: list[tuple[int, np.ndarray]] = []
        rest, length = order[:0], 0
        for length in map(int, np.unique(self.lengths)):
            members = np.concatenate([rest, order[self.lengths[order] == length]])
            full = len(members) - len(members) % self.batch
            plan += [(length, rows) for rows in members[:full].reshape(-1, self.batch)]
            rest = members[full:]
        if len(rest):
            plan.append((length, np.pad(rest, (0, self.batch - len(rest)), constant_values=-1)))
        return [plan[i] for i in rng.permutation(len(plan))] if self.shuffle else plan


def repeated(index: np.ndarray) -> np.ndarray:
    """The examples of a batch, those of its padding rows repeated in turn.

    A batch's statistics (BatchNorm) are then those of images, and not of black squares.

    Example:
      >>> repeated(np.array([7, 5, -1, -1, -1])).tolist()
      [7, 5, 7, 5, 7]
    """
    real = index[index >= 0]
    return np.where(index >= 0, index, real[(np.cumsum(index < 0) - 1) % len(real)])


class Loader:
    """An iterator over batches that knows its position; see :func:`batches`. A finished one iterates anew.

    Attributes:
      examples: what it loads.
      steps_per_epoch: batches of an epoch.
      shapes: the static lengths that its batches have.
    """

    def __init__(self, examples: Examples, schedule: Schedule, epochs: int | None, rows: slice) -> None:
        self.examples = examples
        self.steps_per_epoch = schedule.steps
        self._schedule, self._rows = schedule, rows
        self._total = _ENDLESS if epochs is None else epochs * schedule.steps
        self._plan = functools.lru_cache(maxsize=2)(schedule.epoch)  # threads meet where an epoch ends
        self._identity = self._digest()
        self._iterator = self._start()
        self._finished = False
        self.shapes = tuple(sorted({length for length, _ in schedule.epoch(0)}))

    def _start(self) -> Any:
        import grain

        dataset = grain.MapDataset.range(self._total).map(self.batch)
        # Collating is cheap and happens while the device computes; of decoding, threads make whole batches ahead.
        threads = 0 if self.examples.lazy is None else THREADS
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))

    def batch(self, position: int) -> Batch:
        """This process's rows of the batch at a position; the loader's own position does not move."""
        epoch, step = divmod(position, self.steps_per_epoch)
        length, index = self._plan(epoch)[step]
        key, shown = (self._schedule.seed, epoch), repeated(index)
        return collate(self.examples, index[self._rows], length, key, shown[self._rows])

    def members(self, position: int) -> np.ndarray:
        """The examples of this process's rows of the batch at a position, -1 on padding rows; nothing is made."""
        epoch, step = divmod(position, self.steps_per_epoch)
        return self._plan(epoch)[step][1][self._rows]

    def __iter__(self) -> "Loader":
        if self._finished:
            self._iterator, self._finished = self._start(), False
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            self._finished = True
            raise
        except DataError:  # what was made ahead goes, or the next batch would be taken for this one
            self._iterator.set_state({"next_index": self.position})
            raise

    @property
    def position(self) -> int:
        """The number of batches given so far."""
        return self._iterator.get_state()["next_index"]

    @property
    def epoch(self) -> int:
        """The number of whole epochs given so far."""
        return self.position // self.steps_per_epoch

    def state(self) -> dict[str, Any]:
        """The position, and the identity of the schedule that it counts in; plain values for JSON."""
        return {"position": self.position, "schedule": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state` was taken, on any number of processes.

        Raises:
          DataError: the state belongs to other examples, batches or orders, or lies beyond the end.
        """
        if state["schedule"] != self._identity:
            raise DataError(
                f"loader: the saved position counts in schedule {state['schedule'][:12]}, this is "
                f"{self._identity[:12]}: examples, batch, buckets, shuffle or seed have changed"
            )
        position = int(state["position"])
        if not 0 <= position <= self._total:
            raise DataError(f"loader: the saved position {position} is not in 0..{self._total}")
        self._iterator.close()
        self._iterator, self._finished = self._start(), False
        self._iterator.set_state({"next_index": position})

    def _digest(self) -> str:
        plan = self._schedule
        sha = hashlib.sha256(f"{self.examples.digest()}|{plan.batch}|{plan.shuffle}|{plan.seed}|".encode())
        sha.update(plan.lengths.astype("<i8").tobytes())
        return sha.hexdigest()


def batches(
    examples: Examples,
    *,
    batch: int,
    shuffle: bool,
    buckets: Sequence[int] = (),
    seed: int = 0,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """A deterministic loader: every example once an epoch, in batches of as many shapes as there are buckets.

    Args:
      examples: what to load.
      batch: B, rows of a batch over all processes; each process gets its contiguous ``B / process_count``.
      shuffle: a new order in every epoch; without it, for evaluation, always the same.
      buckets: increasing static lengths for ragged fields; each example goes to the smallest that holds it.
      seed: of the orders.
      epochs: None is without end.
      process_index: of this process.
      process_count: processes that share each batch.

    Raises:
      DataError: a batch that the processes cannot share, or an example longer than the largest bucket.

    Example:
      >>> examples = Examples(ragged={"input_ids": [np.ones(n, np.int32) for n in (2, 3, 7)]})
      >>> [batch["input_ids"].shape for batch in batches(examples, batch=2, shuffle=False, buckets=(4, 8), epochs=1)]
      [(2, 4), (2, 8)]
    """
    if batch < 1 or batch % process_count or not 0 <= process_index < process_count:
        raise DataError(f"batch: process {process_index} of {process_count} cannot have its rows of a batch of {batch}")
    lengths = bucket_lengths(examples.lengths, buckets) if examples.ragged else examples.lengths
    rows = batch // process_count
    schedule = Schedule(lengths, batch, shuffle, seed)
    return Loader(examples, schedule, epochs, slice(process_index * rows, (process_index + 1) * rows))
