"""From a configuration to its source, and where that is placed."""

from functools import partial
from typing import Any

from jax.sharding import Mesh

from jaxtransfer.adapt.quantized import QuantizeError
from jaxtransfer.config import Config
from jaxtransfer.job.adapting import quantize_error, quantized
from jaxtransfer.job.meshes import make_mesh_of as make_mesh_of
from jaxtransfer.parallel import sharding_rules as sharding_rules
from jaxtransfer.source import SourceError, blank, load
from jaxtransfer.tasks import Task
from jaxtransfer.tree.rules import RuleError
from jaxtransfer.types import Source


def load_source(config: Config, task: Task, mesh: Mesh | None, say: Any) -> Source:
    """What the task starts from, at the first reference that is there, straight onto the mesh.

    The bare trunk for a task that puts a fresh head on it, else the source with its own head; quantised as it is read.
    Without weights where none are asked for, or where they are still to be made by ``pretrain``.

    Raises:
      SourceError: the source ends in another head than the task needs, besides what `load` and `blank` raise.
    """
    source = config.source
    refs, failures = (source.ref, *source.alternatives), []
    for ref in refs:
        own = ref == source.ref
        options = {
            "config": source.config if own else None,
            "revision": source.revision if own else None,
            "dtype": source.dtype,
            "ignore": source.ignore,
            **placed(mesh),
        }
        try:
            if source.init == "scratch" or config.pretrain is not None:
                found = quantized(config, blank(ref, head=None if task.fresh_head else task.head, **options))
            else:
                head = None if task.fresh_head else "checkpoint"
                found = load(ref, head=head, quantize=config.adapt.quantize, **options)
        except (RuleError, QuantizeError) as error:
            raise quantize_error(error) from None
        except (SourceError, OSError) as error:
            failures.append(error)
            continue
        for missed, failure in zip(refs, failures, strict=False):
            say(f"source {missed}: not taken, {ref} stands in for it ({failure})")
        check_head(found, task)
        return found
    raise failures[0]


def check_head(source: Source, task: Task) -> None:
    """Raises :class:`SourceError` for a source whose head is not the one that the task goes on with."""
    head = source.model.head
    if not task.fresh_head and (head is None or head.kind != task.head.kind):
        ends = "has no head" if head is None else f"ends in a head for {head.kind}"
        way = "; or take a fresh one, task.head: fresh" if task.name == "masked-lm" else ""
        raise SourceError(
            f"{source.lineage.ref}: {ends}; {task.name} goes on with the head of its source, which must be for "
            f"{task.head.kind}{way}"
        )
    if not task.fresh_head and head is not None and head.labels != task.head.labels:
        raise SourceError(
            f"{source.lineage.ref}: its head tells {', '.join(head.labels)} apart, in this order, the task "
            f"{', '.join(task.head.labels)}; name the source's as task.labels, or take a fresh head"
        )


def placed(mesh: Mesh | None) -> dict[str, Any]:
    """Where a source is put, as keywords of `load`."""
    return {"mesh": mesh, "sharding": () if mesh is None else partial(sharding_rules, mesh)}
