"""The loader: batches of a few static shapes in an order that depends on the seed and the position alone.

The schedule is computed from the lengths of all examples, before any process takes its rows, so all processes agree.
Batch ``i`` is a function of ``(seed, i)``: the state of a loader is its position, and resuming is exact.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtransfer.data.dataset import DataError
from jaxtransfer.data.text import bucket_lengths

Batch = dict[str, np.ndarray]
_ENDLESS = 2**48


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples ready for a model, by field.

    Attributes:
      ragged: field -> one array (T_i, ...) per example, padded to the length of its batch: ``input_ids``.
      fixed: field -> an array (N, ...) of one row per example: ``labels``.
      pad: the value that a ragged field is padded with, 0 by default.
      notes: what the preparation did to the data, for the log.
    """

    ragged: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pad: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(rows) for name, rows in {**self.ragged, **self.fixed}.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise DataError(f"examples: every field needs the same number of rows, at least one; got {sizes}")

    def __len__(self) -> int:
        return len(next(iter({**self.ragged, **self.fixed}.values())))

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64: the length of each example, that of its longest ragged field; 0 where there is none."""
        rows = [[len(row) for row in field] for field in self.ragged.values()]
        return np.max(rows, axis=0) if rows else np.zeros(len(self), np.int64)

    def digest(self) -> str:
        """SHA-256 of all fields."""
        sha = hashlib.sha256()
        for name, rows in sorted({**self.ragged, **{name: [array] for name, array in self.fixed.items()}}.items()):
            sha.update(f"{name}|{self.pad.get(name, 0)}|".encode())
            for row in rows:
                sha.update(f"{row.dtype}{row.shape}".encode() + np.ascontiguousarray(row).data)
        return sha.hexdigest()


def collate(examples: Examples, index: np.ndarray, length: int) -> Batch:
    """One batch: ragged fields padded to ``length``; where ``index`` is -1 a row of padding with weight 0.

    Args:
      examples: N of them.
      index: (B,) positions of the examples, -1 on padding rows.
      length: T.

    Returns:
      The examples' fields, ``attention_mask`` (B, T) int32 where there are ragged ones, ``weight`` (B,) float32 and
      ``index`` (B,) int32. The mask of a padding row holds one position, for a softmax over none is no number.
    """
    real, out = index >= 0, {}
    for name, rows in examples.ragged.items():
        block = np.full((len(index), length, *rows[0].shape[1:]), examples.pad.get(name, 0), rows[0].dtype)
        for row in np.flatnonzero(real):
            values = rows[index[row]]
            block[row, : len(values)] = values
        out[name] = block
    if out:
        lengths = [max(len(rows[i]) for rows in examples.ragged.values()) if i >= 0 else 1 for i in index]
        out["attention_mask"] = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    for name, array in examples.fixed.items():
        out[name] = array[index]  # a copy
        out[name][~real] = 0
    return out | {"weight": real.astype(np.float32), "index": index.astype(np.int32)}


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
        self._plan: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])
        self._identity = self._digest()
        self._iterator = self._start()
        self._finished = False
        self.shapes = tuple(sorted({length for length, _ in schedule.epoch(0)}))

    def _start(self) -> Any:
        import grain

        dataset = grain.MapDataset.range(self._total).map(self.batch)
        # Collating is cheap and happens while the device computes: no threads, hence nothing in flight to lose.
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def batch(self, position: int) -> Batch:
        """This process's rows of the batch at a position; the loader's own position does not move."""
        epoch, step = divmod(position, self.steps_per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._schedule.epoch(epoch))
        length, index = self._plan[1][step]
        return collate(self.examples, index[self._rows], length)

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
