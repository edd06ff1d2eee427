"""Sections about how it came to be: what trained, where the weights come from, the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.report.markup import Html, absent, facts, join, note, table, tag
from jaxtransfer.report.numerals import count, duration, many, number, size, small

Record = Mapping[str, Any]
UNTRAINED = ("frozen", "stats")
MAX_DROPPED = 8
NAMES = {"seconds": "Time", "out": "Run folder", "export": "Exported to"}


def trained(groups: Sequence[Record]) -> tuple[int, int]:
    """Trained and all parameters of a table of groups."""
    every = sum(row["parameters"] for row in groups)
    return every - sum(row["parameters"] for row in groups if row["group"] in UNTRAINED), every


def groups(record: Record) -> Html:
    """The freeze table."""
    rows = record.get("groups")
    if not rows:
        return absent("No table of groups was recorded.")
    some, every = trained(rows)
    said = f"{count(some)} of {many(every, 'parameter')} train."
    if some < every:
        said += " For the others there is no gradient, no optimizer state and no weight decay."
    columns = {"Group": None, "Leaves": "num", "Parameters": "num", "Share": "share", "Bytes": "num"}
    columns |= {"Dtype": None, "Learning rate": "num", "Optimizer": None, "Optimizer bytes": "num"}
    leaves, held, kept = (sum(row[key] for row in rows) for key in ("leaves", "bytes", "optimizer_bytes"))
    foot = ["all", count(leaves), count(every), "", size(held), "", "", "", size(kept)]
    return join([note(said), table(columns, (_group(row, every) for row in rows), foot=foot)])


def _group(row: Record, every: int) -> list[object]:
    kind = "idle" if row["group"] in UNTRAINED else "live"
    share = 100 * row["parameters"] / every if every else 0.0
    bar = tag("span", tag("i", class_=kind, style=f"width:{share:.2f}%"), class_="bar")
    lr = row.get("lr")
    return [
        tag("span", row["group"], class_=kind),
        count(row["leaves"]),
        count(row["parameters"]),
        join([bar, f"{number(share)} %"]),
        size(row["bytes"]),
        row["dtype"],
        small(lr) if isinstance(lr, float | int) else lr or "–",
        row.get("optimizer") or "–",
        size(row["optimizer_bytes"]) if kind == "live" or row["optimizer_bytes"] else "–",
    ]


def lineage(record: Record) -> Html:
    """Where the weights come from, under which licence, and what was done to them."""
    got = record.get("lineage")
    if not got:
        return absent("No lineage was recorded.")
    pairs = [
        ("Source", tag("code", got["ref"])),
        ("Commit", tag("code", got["commit"]) if got.get("commit") else "none"),
        ("Digest (SHA-256)", _digest(got["digest"])),
        ("Licence", got.get("license") or "not stated by the source"),
        ("Base model", got.get("base_model") or "not stated by the source"),
    ]
    files = [[tag("code", name), _digest(sha)] for name, sha in (got.get("files") or {}).items()]
    dropped = [[tag("code", name), reason] for name, reason in (got.get("dropped") or {}).items()]
    steps = [tag("li", tag("code", step)) for step in got.get("operations") or ()]
    unused = table({"Tensor": None, "Reason": None}, dropped)
    if len(dropped) > MAX_DROPPED:
        unused = tag("details", tag("summary", many(len(dropped), "tensor")), unused)
    return join(
        [
            facts(pairs),
            tag("h3", "Operations, in order"),
            tag("ol", *steps, class_="steps") if steps else absent("None: the parameters are as loaded."),
            tag("h3", "Files"),
            table({"File": None, "SHA-256": None}, files) if files else absent("None: it came from memory."),
            tag("h3", "Tensors of the source that are not used"),
            unused if dropped else absent("None."),
        ]
    )


def run(record: Record) -> Html:
    """What ran, where, with what."""
    got, config, study = record.get("run") or {}, record.get("config"), record.get("study")
    pairs: list[tuple[str, object]] = [("Seeds", ", ".join(map(str, study["seeds"])))] if study else []
    for key, value in got.items():
        if value is not None:
            name = NAMES.get(key) or key.replace("_", " ").capitalize()
            pairs.append((name, _fact(key, value)))
    said = tag("details", tag("summary", "Configuration"), tag("pre", tag("code", config))) if config else None
    return join(
        [
            facts(pairs) if pairs else None,
            None if got else absent("No facts about the run were recorded."),
            said or absent("No configuration was recorded."),
        ]
    )


def _fact(key: str, value: Any) -> object:
    if key == "versions":
        return ", ".join(f"{name} {version}" for name, version in value.items()) or "not recorded"
    if key == "seconds":
        return duration(value)
    if key in ("out", "export"):
        return tag("code", value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return count(value) if type(value) is int else f"{value:g}" if type(value) is float else value


def _digest(sha: str) -> Html:
    return tag("code", sha[:12], title=sha)
