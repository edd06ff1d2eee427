"""The page: well-formed, escaped, self-contained, and never silent about what is missing."""

import dataclasses
import errno
import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from jaxtransfer import report
from jaxtransfer.report import plots
from jaxtransfer.study import compare, curve
from tests.report_record import cell, efficiency, example_record, language_record, vision_record

VOID = {"meta", "link", "br", "hr", "img"}
HEADINGS = [
    "Transfer against scratch",
    "Learning curves",
    "What trained",
    "Metrics",
    "Confusion",
    "What it got wrong",
    "Where it comes from",
    "The run",
]
ABSENT = {
    "study": "No control from scratch was recorded.",
    "curves": "No metrics by step were recorded.",
    "groups": "No table of groups was recorded.",
    "metrics": "No metrics were recorded for: test, validation.",
    "subgroups": "No metrics by subgroup were recorded.",
    "confusion": "No confusion matrix was recorded.",
    "wrong": "No examples were recorded.",
    "lineage": "No lineage was recorded.",
    "run": "No facts about the run were recorded.",
    "config": "No configuration was recorded.",
}
EVIL = "<script>alert(\"1\")</script><img src='https://example.com/x.png' onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Checks that elements nest, and collects elements, attributes and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute is repeated in {tag}: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag == "h2":
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "h2" in self.open:
            self.headings[-1] += data

    def all(self, name: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture
def record() -> dict:
    return example_record()


def test_the_page_has_every_section_in_order(record):
    page = Page(report.render(record))
    assert page.headings == HEADINGS
    for said in ABSENT.values():
        assert said not in page.text
    for said in (
        "Customer reviews",
        "91.5 %",
        "+28.5 points",
        "3,697,538 of 22,713,218 parameters train",
        "apache-2.0",
    ):
        assert said in page.text
    assert len(page.all("svg")) == 2 + 4 + 2  # study, curves, metrics


@pytest.mark.parametrize("make", [example_record, vision_record, language_record])
def test_a_record_survives_json(make):
    assert report.render(json.loads(json.dumps(make()))) == report.render(make())


@pytest.mark.parametrize("key", ABSENT)
@pytest.mark.parametrize("how", ["missing", "none", "empty"])
def test_a_missing_part_is_said(record, key, how):
    if how == "missing":
        del record[key]
    else:
        record[key] = None if how == "none" else type(record[key])()
    expected = "None of the evaluated examples." if (key, how) == ("wrong", "empty") else ABSENT[key]
    page = Page(report.render(record))
    assert expected in page.text
    assert page.headings == HEADINGS


def test_an_empty_record_makes_a_page_that_says_so():
    page = Page(report.render({}))
    for said in (*ABSENT.values(), "Untitled run", "whether the transfer helped is not known"):
        assert said in page.text


def test_an_entry_that_nothing_reads_is_refused(record):
    with pytest.raises(report.RecordError, match="'confusions'; did you mean 'confusion'"):
        report.render({**record, "confusions": [[1]]})


def poisoned(value):
    """The same record with every text and every key that is free text replaced by markup."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [poisoned(item) for item in value]
    return EVIL if isinstance(value, str) else value


def test_texts_are_escaped_everywhere(record):
    record |= {"curve": efficiency()} | {key: language_record()[key] for key in ("forgetting", "before")}
    evil = poisoned(record)
    for got in (evil["study"], *evil["curve"]["points"]):
        got["gain"]["verdict"] = "positive"
    evil["study"]["metric"] = evil["curve"]["metric"] = "accuracy"
    evil["forgetting"] = record["forgetting"]
    evil["before"][EVIL] = evil["forgetting"]["before"][EVIL] = evil["forgetting"]["after"][EVIL] = cell(0.5, 0.1)
    evil["curves"] = record["curves"]
    evil["metrics"][EVIL] = {"accuracy": cell(0.5, 0.1), EVIL: cell(0.5, 0.1)}
    evil["subgroups"] = {EVIL: {EVIL: {"accuracy": cell(0.5, 0.1)}}}
    evil["lineage"]["files"] = evil["lineage"]["dropped"] = {EVIL: EVIL}
    evil["run"]["versions"] = {EVIL: EVIL}
    text = report.render(evil)
    page = Page(text)
    assert not page.all("script") and not page.all("img")
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert page.text.count(EVIL) > 30
    assert "&amp;amp;" in text


def test_facts_about_the_run_are_in_words(record):
    record["run"] |= {"metrics": ["accuracy", "auc"], "rejected_steps": None, "best_step": 1200}
    text = Page(report.render(record)).text
    assert "Metricsaccuracy, aucBest step1,200" in text and "Rejected" not in text


def test_only_a_data_uri_of_a_png_becomes_a_picture():
    record = vision_record()
    uris = [row["image"] for row in record["wrong"]]
    for bad in (
        EVIL,
        "https://example.com/x.png",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AA" onload',
    ):
        record["wrong"][0] |= {"image": bad, "label": EVIL}
        page = Page(report.render(record))
        assert [attrs["src"] for attrs in page.all("img")] == uris[1:]
        assert "The picture was not recorded as a PNG." in page.text
        assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


def test_what_html_forbids_is_replaced(record, tmp_path):
    record["wrong"][0]["text"] = "a\x00b\x0cc\ud800d\ufffee\nf"
    path = report.write(record, tmp_path / "report.html")
    assert "a�b�c�d�e\nf" in path.read_text(encoding="utf-8")


def test_nothing_is_loaded_and_nothing_runs(record):
    text = report.render(record)
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed", "video", "audio", "form"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    policy = next(attrs for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def study_of(transfer, scratch, metric="accuracy", **options) -> dict:
    return dataclasses.asdict(compare(metric, range(len(transfer)), transfer, scratch, **options))


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        (
            study_of([0.9, 0.92, 0.925], [0.66, 0.60, 0.63]),
            "Transfer helped: 91.5 % against 63.0 % from scratch, +28.5 points (95 % interval 18.3 to 38.7, 3 seeds): "
            "positive.",
        ),
        (
            study_of([0.66, 0.60], [0.9, 0.85]),
            "Transfer hurt: 63.0 % against 87.5 % from scratch, −24.5 points (95 % interval −30.9 to −18.1, 2 seeds): "
            "negative.",
        ),
        (
            study_of([0.61, 0.60], [0.60, 0.62]),
            "No difference shown: 60.5 % against 61.0 % from scratch, −0.5 points (95 % interval −19.6 to 18.6, "
            "2 seeds): none.",
        ),
        (
            study_of([0.9], [0.6]),
            "Not settled: 90.0 % against 60.0 % from scratch, +30.0 points, without an interval (1 seed): none.",
        ),
        (
            study_of([0.30, 0.31], [0.50, 0.52], "loss", lower_is_better=True),
            "Transfer helped: loss 0.305 against 0.510 from scratch, +0.205 (95 % interval 0.141 to 0.269, 2 seeds): "
            "positive.",
        ),
        (None, "There is no control from scratch, so whether the transfer helped is not known."),
    ],
)
def test_the_verdict_in_words(record, study, sentence):
    record["study"] = study
    assert report.verdict(record) == sentence
    assert sentence in Page(report.render(record)).text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_verdict_of_ones_own_is_used(record):
    record["verdict"] = "Not worth it."
    assert report.verdict(record) == "Not worth it."


def test_without_an_interval_none_is_drawn(record):
    record |= {"study": None, "subgroups": None}
    record["metrics"] = {"test": {"accuracy": {"value": 0.9, "low": -math.inf, "high": math.inf, "n": 1}}}
    page = Page(report.render(record))
    assert "no interval" in page.text
    assert not [attrs for attrs in page.all("line") if attrs["class"].startswith("span")]
    assert "No metrics were recorded for: validation." in page.text


def test_values_that_are_not_finite_are_counted_not_drawn(record):
    rows = record["curves"]["transfer"]
    rows[0]["loss"], rows[1]["loss"] = math.nan, math.inf
    text = report.render(record)
    assert "2 values not finite, left out" in Page(text).text
    assert "nan" not in text and "inf" not in re.sub(r"inform|infin", "", Page(text).text)


def test_curves_of_the_transfer_alone_say_so(record):
    del record["curves"]["scratch"]
    page = Page(report.render(record))
    assert "No curves were recorded for: from scratch." in page.text
    assert not [attrs for attrs in page.all("polyline") if "scratch" in attrs["class"]]


def test_the_confusion_matrix_gives_recall_and_precision(record):
    text = Page(report.render(record)).text
    for said in ("91.7 %", "90.0 %", "90.2 %", "91.5 %"):  # 55/60, 54/60, 55/61, 54/59
        assert said in text


def test_too_many_classes_become_a_list_of_pairs(record):
    n = 40
    record["labels"] = [f"class {k}" for k in range(n)]
    record["confusion"] = [[9 if i == j else 7 * (i == 3 and j == 5) for j in range(n)] for i in range(n)]
    page = Page(report.render(record))
    assert "40 classes are too many for a matrix. Of 1 confused pair" in page.text
    assert "class 3class 5743.8 %" in page.text
    assert not [attrs for attrs in page.all("table") if "heat" in attrs.get("class", "")]


def test_wrong_examples_are_the_most_confident_and_cut(record):
    record["wrong"] = [
        {"text": f"number {k} " + "x" * (2000 if k == 24 else 0), "label": "a", "predicted": "b", "probability": k / 25}
        for k in range(25)
    ]
    text = Page(report.render(record)).text
    assert "20 of 25 recorded examples" in text
    assert text.index("number 24 ") < text.index("number 23 ") and "number 4 " not in text
    assert "x" * 590 in text and "x" * 601 not in text and "(2,010 characters in all)" in text


PICTURED = [heading for heading in HEADINGS if heading != "Transfer against scratch"]


def test_images_that_it_got_wrong_are_shown_and_described():
    page = Page(report.render(vision_record()))
    images = page.all("img")
    assert len(images) == 9 and {attrs["alt"] for attrs in images} == {"normal, taken for pneumonia"}
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in images)
    assert page.headings == ["Labels needed", *PICTURED]
    assert "pneumonia 99.0\N{NO-BREAK SPACE}% instead of normal" in page.text


def test_many_metrics_are_a_table_on_its_side_with_the_roc_curve_beside():
    record = vision_record()
    page = Page(report.render(record))
    assert "MetricTestValidationOver624 examples524 examplesAUC0.951" in page.text
    assert "Sensitivity at 90 % specificity87.2 %85.2 to 89.2" in page.text
    (found,) = [attrs["aria-label"] for attrs in page.all("svg") if "ROC" in attrs["aria-label"]]
    assert found == "ROC curve, AUC 0.951, positive: pneumonia"
    (line,) = [attrs["points"] for attrs in page.all("polyline") if attrs["points"].startswith("50.0,312.0 ")]
    assert line.endswith(" 350.0,12.0")
    record["roc"] = None
    assert "ROC" not in Page(report.render(record)).text


def test_what_the_labels_do_not_define_is_said_and_not_drawn():
    record = vision_record() | {"roc": None}
    for nothing in (math.nan, None):
        record["metrics"]["test"]["auc"] = {
            "value": nothing,
            "low": nothing,
            "high": nothing,
            "n": 3,
            "over": "example",
        }
        record["metrics"]["validation"]["auc"] = record["metrics"]["test"]["auc"]
        text = report.render(record)
        assert "AUCundefinedno intervalundefinedno interval" in Page(text).text
        assert "nan" not in text.replace("dominant", "")


def test_a_language_model_has_no_sections_about_right_and_wrong():
    record = language_record()
    page = Page(report.render(record))
    left = [heading for heading in HEADINGS if heading not in ("Confusion", "What it got wrong")]
    assert page.headings == [left[0], "Forgetting", *left[1:]]
    for said in (
        "Before, bits per byte2.307", "Transfer, bits per byte1.912", "From scratch2.413", "Test perplexity55.4",
        "On the source's data+0.241bits per byte, 1.750 to 1.991",
        "On the source's own data bits per byte went from 1.750 to 1.991: worse by 0.241.",
        "MetricBefore trainingTestValidation", "Bits per byte1.7501.698 to 1.8021.9911.931 to 2.051+0.241",
    ):  # fmt: skip
        assert said in page.text, said
    record["wrong"] = [{"text": "def f(", "label": "x", "predicted": "y", "probability": 0.5}]
    assert "What it got wrong" in Page(report.render(record)).headings


def test_a_metric_of_which_more_is_better_is_forgotten_downwards():
    record = language_record()
    before, after = {"accuracy": cell(0.9, 0.01)}, {"accuracy": cell(0.85, 0.01)}
    record["forgetting"] = {"metric": "accuracy", "before": before, "after": after, "lower_is_better": False}
    page = Page(report.render(record))
    assert "accuracy went from 90.0 % to 85.0 %: worse by 5.0 points." in page.text
    assert [attrs for attrs in page.all("div") if attrs.get("class") == "tile negative"]
    record["forgetting"] |= {"before": after, "after": before}
    page = Page(report.render(record))
    assert "85.0 % to 90.0 %: better by 5.0 points." in page.text
    assert not [attrs for attrs in page.all("div") if attrs.get("class") == "tile negative"]


def curve_of(transfer, scratch, **options) -> dict:
    budgets = [5, 20, 50][: len(transfer)]
    series = [dict(zip(budgets, values, strict=True)) for values in (transfer, scratch)]
    return dataclasses.asdict(curve("accuracy", budgets, *series, **options))


CURVES = [
    (
        curve_of([[0.62, 0.62], [0.82, 0.82], [0.9, 0.9]], [[0.4, 0.41], [0.5, 0.51], [0.72, 0.72]]),
        "Transfer helped at 3 of 3 budgets (accuracy). With about 10 labels per class the transfer is where scratch "
        "is with 50: 5.0 times fewer.",
        "positive",
    ),
    (
        curve_of([[0.8], [0.82], [0.9]], [[0.4], [0.5], [0.72]], unit="examples"),
        "No difference shown at 3 of 3 budgets (accuracy). By the means alone, already with 5 examples the transfer "
        "is where scratch is with 50: 10.0 times fewer or better.",
        "none",
    ),
    (
        curve_of([[0.4, 0.41], [0.5, 0.51], [0.70, 0.72]], [[0.62, 0.62], [0.82, 0.82], [0.72, 0.75]]),
        "Transfer hurt at 2 of 3 budgets; no difference shown at 1 of 3 budgets (accuracy). The transfer does not "
        "reach what 50 labels per class give from scratch.",
        "negative",
    ),
    (
        curve_of([[0.62, 0.62]], [[0.4, 0.41]]),
        "Transfer helped at 1 of 1 budget (accuracy). Already with 5 labels per class the transfer is where scratch is "
        "with 5.",
        "positive",
    ),
]


@pytest.mark.parametrize(("found", "sentence", "kind"), CURVES, ids=range(len(CURVES)))
def test_the_verdict_over_budgets(found, sentence, kind):
    record = vision_record() | {"curve": found}
    assert report.verdict(record) == sentence
    page = Page(report.render(record))
    assert [attrs["class"] for attrs in page.all("p") if attrs.get("class", "").startswith("verdict")] == [
        f"verdict {kind}"
    ]
    bands = [attrs for tag, attrs in page.tags if attrs.get("class", "").startswith("band")]
    assert len(bands) == (2 if len(found["points"]) > 1 and len(found["points"][0]["transfer"]) > 1 else 0)


def test_a_study_speaks_before_the_budgets(record):
    record["curve"] = efficiency()
    page = Page(report.render(record))
    assert page.headings == [HEADINGS[0], "Labels needed", *HEADINGS[1:]]
    first, second = report.verdict(record).split(": positive. ")
    assert first.startswith("Transfer helped: 91.5 %") and second.startswith("With about ")


def test_the_curve_is_drawn_with_every_budget_and_seed():
    record = vision_record()
    page = Page(report.render(record))
    points = record["curve"]["points"]
    for kind in ("transfer", "scratch"):
        (line,) = [
            a["points"] for a in page.all("polyline") if a["class"] == f"curve {kind}" and a["points"].count(",") == 4
        ]
        places = [tuple(map(float, place.split(","))) for place in line.split()]
        steps = [b[0] - a[0] for a, b in pairwise(places)]
        logs = [math.log(b["budget"] / a["budget"]) for a, b in pairwise(points)]
        assert steps == pytest.approx([steps[0] / logs[0] * step for step in logs], abs=0.02)
        dots = [a for a in page.all("circle") if a["class"] == f"part {kind}"]
        assert len(dots) == sum(len(point[kind]) for point in points)
    assert "Labels per classTransferFrom scratchGainVerdict" in page.text
    for point in points:
        assert f"{point['budget']}{point['intervals']['transfer']['value']:.3f}" in page.text


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_extreme_curves_stay_on_the_page(count, metric):
    """One seed, no spread, intervals far beyond the values, budgets by the thousand."""
    wild, flat = [0.1, 0.9][:count], [0.5, 0.5][:count]
    budgets = [1, 2, 3, 10_000]
    got = curve(
        metric, budgets, dict.fromkeys(budgets, wild), dict.fromkeys(budgets, flat), lower_is_better=metric == "loss"
    )
    page = Page(report.render(vision_record() | {"curve": dataclasses.asdict(got)}))
    (svg,) = [i for i, (tag, a) in enumerate(page.tags) if tag == "svg" and "by labels per class" in a["aria-label"]]
    inside = [a for tag, a in page.tags[svg + 1 : svg + 90] if tag in ("circle", "polygon", "polyline")]
    spots = [float(a["cy"]) for a in inside if "cy" in a][:8]
    assert spots and all(12 <= y <= 206 for y in spots)


def test_write_replaces_the_file_and_leaves_nothing_else(record, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    assert report.write(record, path) == path
    assert path.read_text(encoding="utf-8") == report.render(record)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_leaves_what_was_there(record, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(report.ReportError, match=r"cannot write .*report\.html: No space left on device"):
        report.write(record, path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there_is_named(record, tmp_path):
    with pytest.raises(report.ReportError, match="No such file or directory"):
        report.write(record, tmp_path / "absent" / "report.html")


@pytest.mark.parametrize(
    "values", [[0.5], [0.0], [1.0, 1.0], [0.3, 0.1 + 0.2], [-3, 8], [1e-12, 2e-12], [0, 1e9], [0.62, 0.93], [5.0, 6.0]]
)
@pytest.mark.parametrize("bounds", [{}, {"low": 0.0, "high": 1.0}])
def test_axes_hold_their_ticks(values, bounds):
    axis = plots.axis(values, 10, 110, **bounds)
    assert axis.low < axis.high
    assert 1 <= len(axis.ticks) <= 12
    assert all(10 <= axis(value) <= 110 for value in [*values, *axis.ticks])
    assert len({axis.label(tick) for tick in axis.ticks}) == len(axis.ticks)


def test_points_beyond_the_edge_stop_at_it():
    axis = plots.axis([90, 104], 0, 100, low=0, high=100)
    assert axis(104) == axis(100) == 100


def test_thinning_keeps_means_and_says_how_wide():
    points, width = plots.thin([(float(k), float(k)) for k in range(1000)])
    assert len(points) <= 120 and width == 9
    assert points[0] == (4.0, 4.0)
