"""Batches of several domains side by side: the rows to learn, and a further domain's rows behind each."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.data.dataset import DataError
from jaxtransfer.data.examples import Batch
from jaxtransfer.data.loader import Loader


class Paired:
    """A loader whose batches hold one of every further domain under its name; each has its own order and end.

    Example:
      >>> import numpy as np
      >>> from jaxtransfer.data.loader import Examples, batches
      >>> one, two = (Examples(fixed={"x": np.arange(n)}) for n in (4, 6))
      >>> load = lambda examples: batches(examples, batch=2, shuffle=False)
      >>> batch = next(Paired(load(one), {"target": load(two)}))
      >>> batch["x"].tolist(), batch["target"]["x"].tolist()
      ([0, 1], [0, 1])
    """

    def __init__(self, main: Loader, domains: Mapping[str, Loader]) -> None:
        self.main, self.domains = main, dict(domains)

    def __iter__(self) -> "Paired":
        return self

    def __next__(self) -> dict[str, Any]:
        batch: dict[str, Any] = next(self.main)
        others: dict[str, Batch] = {name: next(loader) for name, loader in self.domains.items()}
        return {**batch, **others}

    def state(self) -> dict[str, Any]:
        """Every loader's position; plain values for JSON."""
        return {**self.main.state(), "domains": {name: loader.state() for name, loader in self.domains.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state` was taken.

        Raises:
          DataError: the state belongs to other domains, or to other examples of one.
        """
        saved = state.get("domains", {})
        if saved.keys() != self.domains.keys():
            raise DataError(
                f"loader: the saved position counts in the domains {', '.join(saved) or 'none'}, these are "
                f"{', '.join(self.domains) or 'none'}"
            )
        self.main.restore(state)
        for name, loader in self.domains.items():
            loader.restore(saved[name])
