"""Intervals and gains over seeds, against tables and by hand."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtransfer import study

# Two-sided 95 % points of Student's t from printed tables.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize(("df", "expected"), TABLE.items())
def test_t_quantiles_are_those_of_the_tables(df, expected):
    assert study.t_quantile(0.975, df) == pytest.approx(expected, abs=5e-5)


def test_t_quantile_has_the_closed_forms_of_one_and_two_degrees_of_freedom():
    for p in (0.51, 0.75, 0.9, 0.999):
        assert study.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
        assert study.t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)


@given(st.floats(0.001, 0.999), st.integers(1, 60))
def test_t_quantile_is_odd_about_one_half(p, df):
    assert study.t_quantile(p, df) == pytest.approx(-study.t_quantile(1 - p, df), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.9, 0)])
def test_t_quantile_refuses_what_has_none(p, df):
    with pytest.raises(study.StudyError, match="t_quantile"):
        study.t_quantile(p, df)


def test_interval_by_hand():
    got = study.interval([0.90, 0.92, 0.94])  # mean 0.92, deviation 0.02, half width 4.3027 * 0.02 / sqrt(3)
    assert got.n == 3
    assert got.value == pytest.approx(0.92)
    assert (got.low, got.high) == (pytest.approx(0.870317, abs=1e-6), pytest.approx(0.969683, abs=1e-6))


def test_one_value_has_an_unbounded_interval_and_decides_nothing():
    assert study.interval([0.9]) == study.Interval(0.9, -math.inf, math.inf, 1)
    assert study.gain([0.9], [0.1]).verdict == "none"


@pytest.mark.parametrize(("values", "says"), [([], "no values"), ([0.1, math.nan], "value 1 of 2 is nan")])
def test_interval_refuses_what_has_no_mean(values, says):
    with pytest.raises(study.StudyError, match=says):
        study.interval(values)


@pytest.mark.parametrize(
    ("transfer", "control", "verdict"),
    [
        ([0.91, 0.92, 0.93], [0.62, 0.65, 0.61], "positive"),
        ([0.62, 0.65, 0.61], [0.91, 0.92, 0.93], "negative"),
        ([0.90, 0.91, 0.92], [0.91, 0.92, 0.90], "none"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "none"),
    ],
)
def test_verdicts(transfer, control, verdict):
    got = study.gain(transfer, control)
    assert got.verdict == verdict
    assert got.low <= got.value <= got.high


def test_gain_is_over_pairs_not_over_pools():
    # Seeds differ widely, pairs hardly: 0.1 better each time.
    assert study.gain([0.3, 0.6, 0.91], [0.2, 0.5, 0.8]).verdict == "positive"
    assert study.gain([0.3, 0.6, 0.91], [0.8, 0.2, 0.5]).verdict == "none"


def test_of_a_loss_less_is_a_gain():
    got = study.gain([0.30, 0.31], [0.50, 0.52], lower_is_better=True)
    assert got.verdict == "positive"
    assert got.value == pytest.approx(0.205)


def test_gain_refuses_what_is_not_paired():
    with pytest.raises(study.StudyError, match="3 values of the transfer, 2 of the control"):
        study.gain([1, 2, 3], [1, 2])


def test_compare_gives_a_study_that_a_record_can_hold():
    got = dataclasses.asdict(study.compare("accuracy", [0, 1, 2], [0.91, 0.92, 0.93], [0.62, 0.65, 0.61]))
    assert set(got) == {"metric", "seeds", "transfer", "scratch", "gain", "intervals"}
    assert got["gain"]["verdict"] == "positive"
    assert got["intervals"]["scratch"]["value"] == pytest.approx(0.6266667)
    with pytest.raises(study.StudyError, match="3 seeds, 3 values of the transfer and 2 of the control"):
        study.compare("accuracy", [0, 1, 2], [0.9, 0.9, 0.9], [0.6, 0.6])


TRANSFER = {5: [0.60, 0.64], 20: [0.80, 0.84], 50: [0.88, 0.90]}
SCRATCH = {5: [0.30, 0.34], 20: [0.50, 0.54], 50: [0.70, 0.74]}


def test_a_curve_has_a_comparison_at_every_budget():
    got = study.curve("accuracy", [50, 5, 20], TRANSFER, SCRATCH)
    assert [point.budget for point in got.points] == [5, 20, 50]
    for point in got.points:
        alone = study.compare("accuracy", [0, 1], TRANSFER[point.budget], SCRATCH[point.budget])
        assert (point.gain, point.intervals) == (alone.gain, alone.intervals)
        assert (point.transfer, point.scratch) == (alone.transfer, alone.scratch)


def test_label_saving_by_hand():
    # Scratch has 0.72 with 50; transfer 0.62 with 5 and 0.82 with 20: half-way in the logarithm, that is with 10.
    got = study.curve("accuracy", [5, 20, 50], TRANSFER, SCRATCH)
    assert got.reached == pytest.approx(0.72)
    assert (got.needed, got.saving) == (pytest.approx(10), pytest.approx(5))
    assert not got.at_least


def test_label_saving_of_a_loss_is_that_of_its_negative():
    def minus(values):
        return {budget: [-value for value in row] for budget, row in values.items()}

    got = study.curve("loss", [5, 20, 50], minus(TRANSFER), minus(SCRATCH), lower_is_better=True)
    assert got.saving == pytest.approx(5)
    assert all(point.gain.verdict == "positive" for point in got.points)


def test_a_transfer_that_never_gets_there_saves_nothing():
    got = study.curve("accuracy", [5, 20, 50], SCRATCH, TRANSFER)
    assert (got.needed, got.saving, got.at_least) == (None, None, False)


def test_a_transfer_that_starts_beyond_saves_at_least_all_but_the_smallest_budget():
    got = study.curve("accuracy", [5, 50], {5: [0.9], 50: [0.9]}, {5: [0.1], 50: [0.8]}, unit="examples")
    assert (got.needed, got.saving, got.at_least, got.unit) == (5, 10, True, "examples")


def test_the_first_crossing_counts_where_a_curve_falls_again():
    got = study.curve("accuracy", [1, 10, 100], {1: [0.0], 10: [1.0], 100: [0.2]}, {1: [0.0], 10: [0.0], 100: [0.5]})
    assert got.needed == pytest.approx(10**0.5)


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        ([], "budgets must be different positive numbers"),
        ([5, 5], "budgets must be different positive numbers"),
        ([0, 5], "budgets must be different positive numbers"),
        ([5, 10], "no values of the transfer at budget 10"),
    ],
)
def test_a_curve_refuses(budgets, says):
    with pytest.raises(study.StudyError, match=says):
        study.curve("accuracy", budgets, TRANSFER, SCRATCH)


def test_a_curve_becomes_a_dictionary_of_plain_values():
    got = dataclasses.asdict(study.curve("accuracy", [5, 20, 50], TRANSFER, SCRATCH))
    assert got.keys() >= {"metric", "unit", "points", "reached", "needed", "saving", "at_least", "lower_is_better"}
    assert got["points"][0].keys() == {"budget", "transfer", "scratch", "gain", "intervals"}
