"""The model of a run: written whole, or as what stands beside its source; and put together again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtransfer import checkpoint
from jaxtransfer import config as configs
from jaxtransfer.adapt.adapter_types import Adapter
from jaxtransfer.adapt.subtrees import held_in
from jaxtransfer.config import Config, ImageClassificationConfig
from jaxtransfer.job import adapting
from jaxtransfer.job.optimization import mastered
from jaxtransfer.job.prepare import Job, Say, prepare, trained
from jaxtransfer.job.sources import check_head, load_source, placed
from jaxtransfer.job.tasks import described, make_task
from jaxtransfer.job.terms import terms_of
from jaxtransfer.job.train import best_step, finished, saved_best
from jaxtransfer.models.registry import ConfigFieldError, family
from jaxtransfer.run import Progress
from jaxtransfer.source import PeftError, load, load_adapter
from jaxtransfer.source import export as export_source
from jaxtransfer.source.orbax_folder import sha256
from jaxtransfer.step import bare, init_state, params_of
from jaxtransfer.tasks import Task
from jaxtransfer.tree import fingerprint
from jaxtransfer.tree.paths import flatten
from jaxtransfer.tree.weights import SHARED, is_weight
from jaxtransfer.types import Lineage, Source

CONFIG, RESULT, CHECKPOINTS, EXPORT, ADAPTER = "config.yaml", "result.json", "checkpoints", "model", "adapter"
PRETRAIN, PHASE = "pretrain", "phase.json"
Values = Mapping[str, Any]


def config_of(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
      RunFolderError: the folder holds no run.
    """
    path = folder / CONFIG
    if not path.exists():
        raise checkpoint.RunFolderError(f"{folder}: holds no run ({CONFIG} is missing)")
    return configs.load(path)


def page_of(folder: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
      RunFolderError: it cannot be read.
    """
    path = folder / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        told = f"{path}: cannot be read ({error}); remove it and resume the run, which writes it again"
        raise checkpoint.RunFolderError(told) from None


def apart(config: Config) -> bool:
    """Whether a run keeps what it trained beside its source: it has adapters, or the source is quantised."""
    return bool(config.adapt.adapters or config.adapt.quantize)


def beside(config: Config) -> str | None:
    """The first method of a run that is no part of a weight and cannot be folded into one; None where there is none."""
    methods = (entry.method for entry in config.adapt.adapters)
    return next((method for method in methods if method in ("bottleneck", "prompt", "prefix")), None)


def adapted(folder: Path) -> Source:
    """The model of a run; of an unfinished one its best step so far.

    Where a finished run has written what stands beside its source alone, that is loaded again; the data are not.

    Raises:
      RunFolderError: there is no model and no checkpoint yet.
      CheckpointError: the source is another one by now; DamagedError: the model is.
    """
    config = dataclasses.replace(config_of(folder), out=str(folder))
    if not (folder / RESULT).exists():
        return _so_far(folder, config)
    if apart(config):
        return _rebuilt(folder, config)
    page, source = page_of(folder), load(folder / EXPORT)
    written = page["run"].get("files", {})
    if other := [name for name, value in source.lineage.files.items() if written.get(name, value) != value]:
        raise checkpoint.DamagedError(
            f"{folder / EXPORT / other[0]}: is not the file that the run wrote; remove {RESULT} and resume the run, "
            "which writes both again"
        )
    return dataclasses.replace(source, lineage=Lineage(**page["lineage"]))


def _so_far(folder: Path, config: Config) -> Source:
    """The best step of a run that may be going on, and then removes checkpoints while they are read."""
    progress_of(folder)  # there is one, or nothing needs to be prepared
    seed = config.run.seed
    job = pretrained(prepare(config, lambda text: None))
    job = dataclasses.replace(job, notes=tuple(entry["operation"] for entry in phases_of(job)))
    like, root = job.start(seed), folder / CHECKPOINTS
    while True:
        progress = progress_of(folder)
        try:
            return finished(job, seed, *saved_best(job, root, like, progress), progress)
        except Exception:  # of a folder that vanishes Orbax says many things
            if (root / str(best_step(progress))).exists() or progress_of(folder).batch == progress.batch:
                raise


def _rebuilt(folder: Path, config: Config) -> Source:
    """The source of a finished run under what its best checkpoint holds."""
    page, seed = page_of(folder), config.run.seed
    task = make_task(config, None, page["labels"])
    if config.pretrain is None:
        trunk = load_source(config, task, None, lambda text: None)
    else:
        trunk = _made(config, task, None)
    was, now = page["lineage"]["digest"], trunk.lineage.digest
    if now != was:
        raise checkpoint.CheckpointError(
            f"{folder}: was trained beside {page['lineage']['ref']} with digest {was[:12]}, but {trunk.lineage.ref} "
            f"has {now[:12]} by now; put that source back"
        )
    files = trunk.lineage.files
    if moved := [name for name, value in page["lineage"]["files"].items() if files.get(name, value) != value]:
        raise checkpoint.CheckpointError(
            f"{folder}: was trained beside {page['lineage']['ref']}, whose {moved[0]} is another file by now; put the "
            "one that was there back"
        )
    operations, processor = tuple(page["lineage"]["operations"]), _image_processor(config, task, trunk)
    if checkpoint.latest(folder / CHECKPOINTS) is None:
        source = _of_adapter(folder, page, adapting.headed(config, trunk, task, jax.random.key(seed)))
        lineage = dataclasses.replace(source.lineage, operations=operations)
        return described(config, dataclasses.replace(source, lineage=lineage), processor)
    source = adapting.begun(config, trunk, task, seed)
    steps = page["run"]["steps"]
    terms = terms_of(config, task, trunk, source.model, source.params, steps)
    params = {**mastered(config, source.model, source.params), **terms.beside(seed)}
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, attention="xla"))  # no step is run
    how = trained(alone, task, source.model, params, steps, None, (), terms=terms)
    like = init_state(source.model, params, how["labels"], how["tx"], jax.random.key(seed), terms=terms.states)
    best = folder / CHECKPOINTS / str(best_step(progress_of(folder)))
    state, frozen, _ = checkpoint.restore(best, like=like, lineage=source.lineage)
    lineage = dataclasses.replace(source.lineage, operations=operations)
    source = dataclasses.replace(source, params=bare(params_of(state, frozen)), lineage=lineage)
    return described(config, source, processor)


def _of_adapter(folder: Path, page: Mapping[str, Any], base: Source) -> Source:
    """The model of a finished run whose checkpoints are gone, by the adapter that it wrote."""
    if not (folder / ADAPTER).exists():
        raise checkpoint.RunFolderError(
            f"{folder}: is finished, but its checkpoints are gone, and nothing else holds what it trained; remove "
            f"{RESULT} and resume it, which trains again"
        )
    for name, value in page["run"].get("files", {}).items():
        if (path := folder / ADAPTER / name).exists() and sha256(path) != value:
            raise checkpoint.DamagedError(f"{path}: is not the file that the run wrote, and its checkpoints are gone")
    return load_adapter(base, folder / ADAPTER)


def _image_processor(config: Config, task: Task, trunk: Source) -> Any:
    """How a run prepared images, None where it read others: by the files that it found, before its source was made."""
    if not isinstance(config.task, ImageClassificationConfig):
        return None
    found = trunk if config.pretrain is None else load_source(config, task, None, lambda text: None)
    return task.processor(found)


def phases_of(job: Job) -> list[dict[str, Any]]:
    """The records of the phases that are finished, in order."""
    paths = [Path(phase.config.out) / PHASE for phase in job.phases]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def progress_of(folder: Path) -> Progress:
    """Where the last checkpoint of a run stands."""
    root, progress = folder / CHECKPOINTS, Progress()
    if (last := checkpoint.latest(root)) is None:
        raise checkpoint.RunFolderError(f"{folder}: has no model and no checkpoint yet; resume it")
    progress.load(checkpoint.metadata(root / str(last))["extra"]["progress"])
    return progress


def pretrained(job: Job) -> Job:
    """A job with the source that another run has made for it, once that is finished; any other job as it is."""
    if job.before is None:
        return job
    trunk = _made(job.config, job.task, job.mesh)
    phases = tuple(dataclasses.replace(phase, trunk=trunk) for phase in job.phases)
    return dataclasses.replace(job, trunk=trunk, phases=phases, before=None)


def _made(config: Config, task: Task, mesh: Mesh | None) -> Source:
    """The source that the run of ``pretrain`` has made."""
    folder = Path(config.out) / PRETRAIN
    head = None if task.fresh_head else "checkpoint"
    source = load(folder / EXPORT, head=head, dtype=config.source.dtype, **placed(mesh))
    check_head(source, task)
    made = page_of(folder)["lineage"]
    operations = tuple(made["operations"])
    lineage = dataclasses.replace(source.lineage, ref=made["ref"], license=made["license"], operations=operations)
    return adapting.quantized(config, dataclasses.replace(source, lineage=lineage))


def write(source: Source, folder: Path, config: Config, progress: Progress, values: Values, say: Say) -> Path:
    """The model of a run into its folder: whole, or where it stands beside its source that alone.

    The latter as PEFT reads it, or where PEFT has no form for it, as the best checkpoint, which is there.
    """
    if getattr(source.assets.get("processor"), "grey", False):
        say("the model's folder does not say that colour is turned into grey: give transformers grey images")
    if not apart(config):
        return write_whole(source, folder / EXPORT, values, say)
    try:
        path = write_peft(source, folder / ADAPTER, values)
    except (PeftError, ConfigFieldError) as error:
        say(f"the model is the best checkpoint, beside {source.lineage.ref} ({error})")
        return folder / CHECKPOINTS / str(best_step(progress))
    hint = f"; `jaxtransfer merge {folder}` folds it in" if beside(config) is None else ""
    say(f"the model is {path}, beside {source.lineage.ref}{hint}")
    return path


def write_whole(source: Source, path: Path, values: Values, say: Say) -> Path:
    """Hugging Face layout where a class of theirs computes the model, Orbax where none does."""
    try:
        return export_source(source, path, format="hf", metrics=values)
    except ConfigFieldError as error:
        say(f"exported as orbax: {error}")
        return export_source(source, path, format="orbax", metrics=values)


def write_peft(source: Source, path: Path, values: Values) -> Path:
    """The adapters, and the head that was trained beside them, as PEFT reads them.

    Raises:
      PeftError: there are no adapters, PEFT has no form for them, or more than a head was trained beside them.
      ConfigFieldError: no Hugging Face class computes the model that they are on.
    """
    family(source.model.family).export_config(source.model, source.assets["config"])
    inside = held_in(source)
    others = ("head/", f"{SHARED}/", *(f"{slot}/" for slot in inside))
    nodes = flatten(source.params, is_leaf=is_weight)
    if not inside and not any(isinstance(node, Adapter) for node in nodes.values()):
        raise PeftError("there are no adapters for PEFT: leaves of the model itself were trained, beside packed ones")
    plain = {path: leaf for path, leaf in nodes.items() if not is_weight(leaf) and not path.startswith(others)}
    known = source.lineage.fingerprints
    if moved := [path for path, value in fingerprint(plain).items() if known.get(path) != value]:
        raise PeftError(f"{moved[0]} was trained beside the adapters, and PEFT's folder holds adapters and heads alone")
    return export_source(source, path, format="peft", metrics=values)
