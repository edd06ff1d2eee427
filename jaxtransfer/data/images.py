"""Images into `pixel_values`: checked once before the work starts, decoded batch by batch as it goes on.

A row of pixels depends on its image, its processor and, in training, on the key ``(seed, epoch)`` and its index.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtransfer.data.augment import Augment as Augment
from jaxtransfer.data.augment import erase, random_crop, vary
from jaxtransfer.data.dataset import DataError, Dataset
from jaxtransfer.data.decode import ImageError, decode, quiet, stored
from jaxtransfer.data.loader import THREADS, Examples
from jaxtransfer.data.processor import ImageProcessor as ImageProcessor
from jaxtransfer.data.processor import processor as processor

_NAMED = 5  # of bad images, so many are named, and all are counted
_CHUNK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images that are decoded when their batch is made: the lazy field ``pixel_values`` of `Examples`.

    Attributes:
      values: a path, bytes or an array for each example.
      processor: how they become pixels, of a known size.
      augment: how they vary in training; None in evaluation.
      contents: SHA-256 over what each of them holds.
    """

    values: Sequence[Any]
    processor: ImageProcessor
    augment: Augment | None
    contents: str

    ragged = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def random(self) -> bool:
        """Whether training varies them."""
        return self.augment is not None

    @property
    def padding(self) -> Mapping[str, np.ndarray]:
        """A row of zeros (H, W, C)."""
        assert self.processor.size is not None
        return {"pixel_values": np.zeros((*self.processor.size, self.processor.channels), np.float32)}

    def digest(self) -> str:
        """SHA-256 of the images' bytes, the processor and the augmentation."""
        how = [dataclasses.asdict(self.processor), self.augment and dataclasses.asdict(self.augment)]
        return hashlib.sha256(f"{self.contents}{json.dumps(how, sort_keys=True)}".encode()).hexdigest()

    def __call__(self, index: int, key: Sequence[int]) -> dict[str, np.ndarray]:
        """``pixel_values`` (H, W, C) float32 of one example.

        Raises:
          DataError: a file that has changed since it was checked.
        """
        how = self.processor
        try:
            image, _ = decode(stored(self.values[index]), how.channels, how.grey)
        except ImageError as error:
            name = _name(self.values[index], f"image {index}")
            raise DataError(f"{name} {error}; it was whole when it was checked") from None
        if self.augment is None:
            return {"pixel_values": how.normalise(how.fit(image))}
        rng = np.random.default_rng([*key, index])
        if self.augment.crop_scale is None:
            image = how.fit(image)
        else:
            assert how.size is not None
            image = random_crop(image, self.augment, how.size, how.filter, rng)
        return {"pixel_values": erase(how.normalise(vary(image, self.augment, rng)), self.augment, rng)}


def examples(
    dataset: Dataset,
    processor: ImageProcessor,
    *,
    augment: Augment | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    labels: Mapping[str, np.ndarray],
) -> Examples:
    """The data set's images as examples, after each has been decoded once, in threads, to see that it can be.

    Args:
      dataset: with a column ``image`` of paths, bytes or arrays.
      processor: how images become pixels; without a size the images have to agree in theirs.
      augment: for training.
      on_bad: ``"stop"`` at images that cannot be used, or ``"skip"`` them, with a note that names and counts them.
      labels: further fields, (N, ...) with a row for each row of the data set; those of skipped images go too.

    Raises:
      DataError: bad images in ``"stop"``, none that is good, or sizes that differ where the processor has none.
    """
    if on_bad not in ("stop", "skip"):
        raise DataError(f"on_bad: must be stop or skip, got {on_bad!r}")
    quiet()
    values = [row.values["image"] for row in dataset.rows]
    seen = _look(values, processor)
    notes = [*dataset.notes, *processor.notes]
    kept = np.array([i for i, look in enumerate(seen) if not look.problem], np.int64)
    if bad := [i for i, look in enumerate(seen) if look.problem]:
        named = [f"{_name(values[i], dataset.rows[i].where)} {seen[i].problem}" for i in bad[:_NAMED]]
        told = "; ".join(named + ([f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else []))
        if on_bad == "stop" or not len(kept):
            advice = "mend or remove them, or set on_bad: skip" if len(kept) else "none is left"
            raise DataError(f"{dataset.path}: {len(bad)} of {len(values)} images cannot be used: {told}; {advice}")
        notes.append(f"{dataset.path}: skipped {len(bad)} of {len(values)} images: {told}")
    good = [seen[i] for i in kept]
    for what in dict.fromkeys(note for look in good for note in look.notes):
        notes.append(f"{dataset.path}: {sum(what in look.notes for look in good)} of {len(good)} images are {what}")
    if processor.size is None:
        processor = dataclasses.replace(processor, resize=_one_size(dataset, kept, seen))
    contents = hashlib.sha256("".join(look.content for look in good).encode()).hexdigest()
    return Examples(
        fixed={name: np.asarray(rows)[kept] for name, rows in labels.items()},
        lazy=Images([values[i] for i in kept], processor, augment, contents),
        notes=tuple(notes),
        kept=kept if bad else None,
    )


class _Look(NamedTuple):
    """What decoding an image once has shown."""

    content: str = ""
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    problem: str = ""


def _look(values: Sequence[Any], how: ImageProcessor) -> list[_Look]:
    def look(value: Any) -> _Look:
        try:
            data = stored(value)
            image, notes = decode(data, how.channels, how.grey)
        except ImageError as error:
            return _Look(problem=str(error))
        content = data if isinstance(data, bytes) else f"{data.dtype}{data.shape}".encode() + data.tobytes()
        return _Look(hashlib.sha256(content).hexdigest(), (image.height, image.width), tuple(notes))

    chunks = [values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(itertools.chain.from_iterable(pool.map(lambda chunk: [look(value) for value in chunk], chunks)))


def _one_size(dataset: Dataset, kept: np.ndarray, seen: Sequence[_Look]) -> tuple[int, int]:
    first = int(kept[0])
    for i in kept:
        if seen[i].size != seen[first].size:
            raise DataError(
                f"{dataset.path}: images differ in size, and neither the model nor size fixes one: "
                + " and ".join(
                    f"{_name(dataset.rows[j].values['image'], dataset.rows[j].where)} is "
                    f"{seen[j].size[0]} x {seen[j].size[1]}"
                    for j in (first, int(i))
                )
            )
    return seen[first].size


def _name(value: Any, where: str) -> str:
    """What an image is called in a message: its file, or its row's place."""
    path = value.get("path") if isinstance(value, dict) else value
    return where if path is None or isinstance(path, (bytes, np.ndarray)) or not str(path).strip() else str(path)
