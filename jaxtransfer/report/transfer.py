"""Sections about what the transfer gave and took: against scratch, labels needed, forgetting."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from jaxtransfer.report import plots
from jaxtransfer.report.markup import Html, absent, join, note, table, tag
from jaxtransfer.report.numerals import ends, gained, highest, is_share, many, named, number, shown, titled
from jaxtransfer.report.scores import NAMES, cell, dots, figure

Record = Mapping[str, Any]


def study(record: Record) -> Html:
    """Transfer and control by seed, and the gain."""
    if not (got := record.get("study")):
        return absent("No control from scratch was recorded.")
    metric, gain, ranges = got["metric"], got["gain"], got.get("intervals") or {}
    rows = [
        plots.Row(name, fmean(got[key]), *ends(ranges.get(key) or {}), parts=tuple(got[key]), kind=key)
        for key, name in NAMES.items()
    ]
    pairs = [a - b for a, b in zip(got["transfer"], got["scratch"], strict=True)]
    sign = -1.0 if sum(pairs) * gain["value"] < 0 else 1.0  # of a loss, less is a gain
    change = plots.Row("gain", gain["value"], *ends(gain), parts=tuple(sign * p for p in pairs), kind="gain")
    said = f"Small dots are the seeds {', '.join(map(str, got['seeds']))}, large dots their means, bars the 95 % "
    plot = plots.dot_plot(
        [change],
        show=lambda value: gained(metric, value),
        percent=is_share(metric),
        zero=True,
        about=f"Gain: {gained(metric, gain['value'])}",
    )
    figures = [
        figure(dots(metric, rows), titled(metric)),
        figure(plot, f"Gain in {named(metric)}" + (", points" if is_share(metric) else "")),
    ]
    explained = note(said, "intervals by Student's t; that of the gain is over the differences of paired seeds.")
    return join([explained, tag("div", *figures, class_="figures")])


def saved(curve: Record) -> str:
    """How many labels the transfer saves, in a sentence.

    Example:
      >>> points = [{"budget": n, "gain": {"verdict": "positive"}} for n in (5, 50)]
      >>> curve = {"unit": "labels per class", "points": points}
      >>> print(saved({**curve, "needed": 6.3, "saving": 7.9, "at_least": False}))
      With about 6.3 labels per class the transfer is where scratch is with 50: 7.9 times fewer.
    """
    unit, most = curve["unit"], f"{curve['points'][-1]['budget']:,}"
    if curve["needed"] is None:
        return f"The transfer does not reach what {most} {unit} give from scratch."
    alone = not any(point["gain"]["verdict"] == "positive" for point in curve["points"])
    when, times = "already with" if curve["at_least"] else "with about", ""
    if curve["saving"] > 1:
        times = f": {number(curve['saving'])} times fewer" + (" or better" if curve["at_least"] else "")
    start = f"By the means alone, {when}" if alone else when.capitalize()
    return f"{start} {amount(curve['needed'])} {unit} the transfer is where scratch is with {most}{times}."


def amount(value: float) -> str:
    """A number of labels, of which fractions matter where there are few.

    Example:
      >>> amount(5.0), amount(7.46), amount(271.8)
      ('5', '7.5', '272')
    """
    return number(value, 1 if value < 10 and value != round(value) else 0)


def efficiency(record: Record) -> Html:
    """The data-efficiency curve and its table."""
    got = record["curve"]
    metric, points = got["metric"], got["points"]
    series = {
        kind: {
            p["budget"]: plots.Row(
                f"{name}, {p['budget']:,} {got['unit']}",
                p["intervals"][kind]["value"],
                *ends(p["intervals"][kind]),
                parts=tuple(p[kind]),
                kind=kind,
            )
            for p in points
        }
        for kind, name in NAMES.items()
    }
    level = None
    if got["needed"] is not None and got["saving"] > 1:
        fewer = f"{'≥ ' if got['at_least'] else ''}{number(got['saving'])} × fewer labels"
        level = (got["needed"], got["reached"], fewer)
    plot = plots.efficiency(
        series,
        names=NAMES,
        show=lambda value: shown(metric, value),
        percent=is_share(metric),
        most=highest(metric),
        unit=f"{got['unit']} (logarithmic)",
        level=level,
        about=f"{titled(metric)} of transfer and control by {got['unit']}",
    )
    columns = {titled(got["unit"]): "num", "Transfer": "num", "From scratch": "num", "Gain": "num", "Verdict": None}
    rows = [_point(metric, p) for p in points]
    seeds = many(len(points[0]["transfer"]), "seed")
    said = f"Means over {seeds}; small dots are the seeds, bands and what is below a value the 95 % intervals by "
    said += "Student's t. The saving is read off the line between the means."
    parts = tag("div", table(columns, rows), figure(plot, titled(metric)), class_="beside")
    return join([note(saved(got)), note(said), parts])


def _point(metric: str, point: Record) -> list[object]:
    gain = point["gain"]
    low, high = ends(gain)
    below = "no interval" if low is None or high is None else f"{gained(metric, low)} to {gained(metric, high)}"
    below = below.replace(" points to", " to").replace(" points", "")
    return [
        f"{point['budget']:,}",
        *(cell(metric, point["intervals"][kind]) for kind in NAMES),
        join([gained(metric, gain["value"]), tag("span", below, class_="below")]),
        tag("span", gain["verdict"], class_=f"word {gain['verdict']}"),
    ]


def forgetting(record: Record) -> Html:
    """What training for the target did to the source's own task."""
    got = record["forgetting"]
    metric, before, after = got["metric"], got["before"], got["after"]
    names = [metric, *(name for name in before if name in after and name != metric)]
    columns = {"Metric": None, "Before": "num", "After": "num", "Change": "num"}
    rows: list[list[object]] = [
        [
            titled(name),
            cell(name, before[name]),
            cell(name, after[name]),
            gained(name, after[name]["value"] - before[name]["value"]),
        ]
        for name in names
    ]
    shades = [
        plots.Row(said, cells[metric]["value"], *ends(cells[metric]), kind=kind)
        for said, cells, kind in (("before", before, "before"), ("after", after, "transfer"))
    ]
    plot = figure(dots(metric, shades), titled(metric))
    beside = tag("div", table(columns, rows), plot, class_="beside")
    return join([note(forgot(got)), beside])


def forgot(got: Record) -> str:
    """What happened to the source's own task, in a sentence.

    Example:
      >>> before, after = {"loss": {"value": 1.2}}, {"loss": {"value": 1.5}}
      >>> print(forgot({"metric": "loss", "before": before, "after": after, "lower_is_better": True}))
      On the source's own data loss went from 1.200 to 1.500: worse by 0.300.
    """
    metric = got["metric"]
    before, after = (got[when][metric]["value"] for when in ("before", "after"))
    change = (before - after) if got["lower_is_better"] else (after - before)
    word = "better by" if change > 0 else "worse by"
    by = f"{word} {gained(metric, abs(change)).lstrip('+')}" if change else "no change"
    return (
        f"On the source's own data {named(metric)} went from {shown(metric, before)} to {shown(metric, after)}: {by}."
    )
