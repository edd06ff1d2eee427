"""Sections about what it gets wrong: the confusion of classes, and examples."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.report.markup import Html, absent, join, note, table, tag
from jaxtransfer.report.numerals import count, many, number

Record = Mapping[str, Any]
MAX_CLASSES, MAX_PAIRS = 30, 20
MAX_EXAMPLES, MAX_TEXT = 20, 600
PICTURE = re.compile("data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


def confusion(record: Record) -> Html:
    """A heat table of the counts, or the pairs most often confused where there are too many classes to see."""
    counts = record.get("confusion")
    if not counts:
        return absent("No confusion matrix was recorded.")
    labels = record.get("labels") or [str(k) for k in range(len(counts))]
    if len(counts) > MAX_CLASSES:
        return _pairs(counts, labels)
    right = [counts[k][k] for k in range(len(counts))]
    truths = [sum(row) for row in counts]
    guesses = [sum(column) for column in zip(*counts, strict=True)]
    heads = (tag("th", _label(label), scope="col", title=label, class_="label") for label in labels)
    corner = tag("th", "truth ↓ predicted →", class_="corner", scope="col")
    rows = [tag("tr", corner, *heads, tag("th", "recall", scope="col", class_="edge"))]
    for k, row in enumerate(counts):
        name = tag("th", _label(labels[k]), scope="row", title=labels[k], class_="label")
        heat = (_heat(n, n / truths[k] if n else 0.0, hit=j == k) for j, n in enumerate(row))
        rows.append(tag("tr", name, *heat, tag("td", _ratio(right[k], truths[k]), class_="edge")))
    foot = (tag("td", _ratio(r, n), class_="edge") for r, n in zip(right, guesses, strict=True))
    last = tag("th", "precision", scope="row", class_="edge")
    rows.append(tag("tr", last, *foot, tag("td", class_="edge")))
    heated = tag("table", *rows, class_="heat crowded" if len(counts) > 4 else "heat")
    said = "Rows are the true classes, columns the predicted ones; the shade is the share of the row."
    return join([note(said), tag("div", heated, class_="wide")])


def _label(name: str) -> Html:
    return tag("span", name, dir="auto")


def _heat(n: int, share: float, *, hit: bool) -> Html:
    kind = ("hit" if hit else "miss") + (" deep" if share > 0.8 else "") + ("" if n else " none")
    title = f"{number(100 * share)} % of the row"
    return tag("td", count(n), class_=kind, style=f"--share:{share:.3f}", title=title)


def _ratio(part: int, whole: int) -> str:
    return f"{number(100 * part / whole)} %" if whole else "–"


def _pairs(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Html:
    pairs = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    most = pairs[:MAX_PAIRS]
    rows = [[labels[i], labels[j], count(n), _ratio(n, sum(counts[i]))] for n, i, j in most]
    said = f"{len(labels)} classes are too many for a matrix. "
    said += f"Of {many(len(pairs), 'confused pair')} the {len(most)} most frequent:"
    columns = {"Truth": None, "Predicted": None, "Examples": "num", "Of the class": "num"}
    return join([note(said), table(columns, rows)])


def wrong(record: Record) -> Html:
    """The examples it got wrong, the most confident first."""
    examples = record.get("wrong")
    if examples is None:
        return absent("No examples were recorded.")
    if not examples:
        return absent("None of the evaluated examples.")
    ordered = sorted(examples, key=lambda example: -example["probability"])[:MAX_EXAMPLES]
    said = f"{len(ordered)} of {many(len(examples), 'recorded example')}, the most confident first."
    pictured = all("image" in example for example in ordered)
    kind = "cards pictures" if pictured else "cards"
    return join([note(said), tag("ol", *map(_picture if pictured else _example, ordered), class_=kind)])


def _picture(example: Record) -> Html:
    about = f"{example['label']}, taken for {example['predicted']}"
    if PICTURE.fullmatch(str(example["image"])):
        shown = tag("img", src=example["image"], alt=about)
    else:
        shown = absent("The picture was not recorded as a PNG.")
    return tag("li", shown, _answer(example))


def _example(example: Record) -> Html:
    text, cut = str(example.get("text", "")), None
    if len(text) > MAX_TEXT:
        cut = tag("span", f" … ({count(len(text))} characters in all)", class_="cut")
        text = text[:MAX_TEXT]
    return tag("li", tag("p", text, cut, dir="auto"), _answer(example))


def _answer(example: Record) -> Html:
    predicted = tag("b", example["predicted"], class_="miss", dir="auto")
    sure = f" {number(100 * example['probability'])}\N{NO-BREAK SPACE}% instead of "
    return tag("div", predicted, sure, tag("b", example["label"], dir="auto"), class_="answer")
