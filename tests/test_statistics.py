import math

import numpy as np
import pytest
from scipy import stats

from custom.evaluation.statistics.markdown import table_cells, to_markdown
from custom.evaluation.statistics.per_organ import compare, merge_folds, summarise, worst_rows
from custom.evaluation.statistics.significance import bootstrap_interval, signed_rank_p


def row(case, organ="liver", dsc=0.5, status="ok", **more):
    return {"case": case, "protocol": "plain", "organ": organ, "status": status, "dsc": dsc, **more}


def run(scores, organ="liver", **more):
    return [row(f"c{index}", organ, score, **more) for index, score in enumerate(scores)]


# -- intervals ----------------------------------------------------------------------------------------


def test_interval_is_scipys_bca():
    differences = np.random.default_rng(1).gamma(2.0, size=25) - 1
    ours = bootstrap_interval(differences, draws=20_000)
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="BCa", random_state=0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.04)
    percentile = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", random_state=0
    )
    assert abs(ours.high - percentile.confidence_interval.high) > 0.04  # the skew is seen


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(size=30), draws=500, level=0.8, seed=i) for i in range(300)]
    assert 0.72 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.86


def test_interval_repeats_with_its_seed_and_ignores_missing_values():
    values = [0.1, -0.2, 0.4, 0.3, 0.05]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval([*values, math.nan], seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_training_seeds_widen_the_interval():
    cases = np.random.default_rng(0).normal(size=40)
    agreeing, disagreeing = np.stack([cases] * 3), cases + np.array([[-1.0], [0.0], [1.0]])
    width = {
        name: np.ptp(bootstrap_interval(t))
        for name, t in (("one", cases), ("same", agreeing), ("wide", disagreeing))
    }
    assert width["same"] == pytest.approx(width["one"], rel=0.05)
    assert width["wide"] > 2 * width["one"]


def test_too_little_to_say_is_nan_and_equal_values_are_a_point():
    for values in ([], [1.0], [math.nan, 2.0], [0.1, 0.3], np.full((2, 3), math.nan)):
        assert np.isnan(bootstrap_interval(values)).all()
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_infinite_values_and_odd_levels_are_refused():
    with pytest.raises(ValueError, match="infinite value has no mean"):
        bootstrap_interval([1.0, math.inf])
    with pytest.raises(ValueError, match=r"level in \(0, 1\).*95"):
        bootstrap_interval([1.0, 2.0], level=95)


# -- the test -----------------------------------------------------------------------------------------


def test_signed_rank_by_hand():
    # all n differences positive: 2 of the 2**n sign patterns are as extreme
    assert signed_rank_p([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 2**5)
    # ranks 1 2 3, the smallest negative: rank sums 1 and 5; 4 of 8 patterns are as extreme
    assert signed_rank_p([-0.1, 0.2, 0.3]) == pytest.approx(4 / 8)


def test_signed_rank_takes_zeros_infinities_and_nan():
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert math.isnan(signed_rank_p([math.nan]))
    assert signed_rank_p([0.1, 0.2, 0.3, math.nan, math.inf]) == signed_rank_p([0.1, 0.2, 0.3, 9.0])
    values = [0.0, 0.0, 0.3, -0.1, 0.25, 0.4, -0.15, 0.6]
    assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values, zero_method="pratt").pvalue)
    assert signed_rank_p(values) != pytest.approx(signed_rank_p([value for value in values if value]))


def test_differences_of_rounding_are_ties():
    a, b = (
        np.array([0.8, 0.7, 0.1, 0.3]),
        np.array([0.9, 0.8, 0.2, 0.2]),
    )  # +0.1 three times and -0.1, but for 1e-17
    assert signed_rank_p(b - a) == signed_rank_p([1.0, 1.0, 1.0, -1.0])


# -- comparing ----------------------------------------------------------------------------------------


def test_compare_by_hand():
    a = run([0.5, 0.6, 0.7]) + run([0.2, 0.4, 0.6], "spleen")
    b = run([0.6, 0.8, 0.7]) + run([0.3, 0.3, 0.9], "spleen")
    liver, spleen, overall = compare(a, b)
    assert (liver.organ, spleen.organ, overall.organ) == ("liver", "spleen", "overall")
    assert (liver.mean_a, liver.mean_b, liver.difference) == pytest.approx((0.6, 0.7, 0.1))
    assert (spleen.mean_a, spleen.mean_b, spleen.difference) == pytest.approx((0.4, 0.5, 0.1))
    assert overall.num_pairs == 3  # cases: means 0.35 0.5 0.65 and 0.45 0.55 0.8
    assert (overall.mean_a, overall.mean_b, overall.difference) == pytest.approx((0.5, 0.6, 0.1))
    assert overall.interval == pytest.approx(bootstrap_interval([0.1, 0.05, 0.15]))
    assert overall.p_value == pytest.approx(2 / 2**3)
    assert not any(overall.counts.values())


def test_rows_pair_by_case_in_any_order():
    a, b = run([0.5, 0.6, 0.7, 0.1]), run([0.6, 0.8, 0.7, 0.3])
    assert compare(a, b) == compare(a[::-1], [b[2], b[0], b[3], b[1]])


def test_swapping_the_runs_swaps_the_sign():
    rng = np.random.default_rng(0)
    a, b = run(rng.random(9)), run(rng.random(9))
    for there, back in zip(compare(a, b), compare(b, a), strict=True):
        assert there.difference == pytest.approx(-back.difference)
        assert there.interval == pytest.approx([-back.interval.high, -back.interval.low], abs=0.02)
        assert there.p_value == pytest.approx(back.p_value)


def test_failures_and_absences_are_counted():
    nan, inf = math.nan, math.inf
    a = [
        row("c0", dsc=0.5, hd95=4.0),
        row("c1", dsc=0.0, hd95=inf, status="missed"),
        row("c2", dsc=nan, hd95=nan, status="absent"),
        row("c3", dsc=nan, hd95=nan, status="absent"),
        row("c4", dsc=0.7, hd95=2.0),
        row("c6", dsc=0.4, hd95=3.0),
    ]
    b = [
        row("c0", dsc=0.7, hd95=3.0),
        row("c1", dsc=0.8, hd95=2.0),
        row("c2", dsc=nan, hd95=nan, status="absent"),
        row("c3", dsc=0.0, hd95=inf, status="spurious"),
        row("c5", dsc=0.9, hd95=1.0),
        row("c6", dsc=0.4, hd95=3.0),
    ]
    liver, overall = compare(a, b, "dsc")
    assert liver.num_pairs == 3  # c0, c1 with its 0, c6
    assert liver.difference == pytest.approx((0.2 + 0.8 + 0.0) / 3)
    of_a, of_b = {"missed in A": 1, "only in A": 1}, {"spurious in B": 1, "only in B": 1}
    expected = {"absent": 1, "without a score": 2, **of_a, **of_b}
    assert {what: count for what, count in liver.counts.items() if count} == expected
    assert overall.counts == liver.counts

    liver, _ = compare(a, b, "hd95")
    assert (liver.num_pairs, liver.mean_a, liver.mean_b) == (2, 3.5, 3.0)  # c0, c6
    assert (liver.counts["infinite in A"], liver.counts["infinite in B"]) == (
        1,
        1,
    )  # b's is that of c3, unpaired
    assert liver.p_value == signed_rank_p([-1.0, -inf, 0.0])  # the found organ of c1 counts for B


@pytest.mark.parametrize("missed_in", ["A", "B"])
def test_an_infinite_organ_leaves_the_rest_of_its_case_in_the_overall_mean(missed_in):
    inf = math.inf
    a = [
        row("c0", "liver", 1.0),
        row("c0", "spleen", inf, "missed"),
        row("c1", "liver", 3.0),
        row("c1", "spleen", 5.0),
    ]
    b = [row("c0", "liver", 2.0), row("c0", "spleen", 4.0), row("c1", "liver", 2.0), row("c1", "spleen", 4.0)]
    overall = compare(*((a, b) if missed_in == "A" else (b, a)))[-1]
    assert (overall.num_pairs, overall.mean_a, overall.mean_b) == (2, 2.5, 2.5)  # 1 and 4; 2 and 3
    assert overall.counts[f"infinite in {missed_in}"] == 1


def test_an_organ_missed_by_both_runs_is_a_tie_for_its_seed():
    others = [f"c{index}" for index in range(1, 6)]
    a = [
        row("c0", dsc=math.inf, seed=0),
        row("c0", dsc=0.4, seed=1),
        *(row(case, dsc=0.1, seed=0) for case in others),
    ]
    b = [
        row("c0", dsc=math.inf, seed=0),
        row("c0", dsc=0.7, seed=1),
        *(row(case, dsc=0.3, seed=0) for case in others),
    ]
    liver, _ = compare(a, b)
    assert liver.num_pairs == 6
    assert liver.p_value == signed_rank_p([0.15] + [0.2] * 5) == 2 / 2**6


def test_seeds_are_pairs_of_their_own_and_the_test_sees_cases():
    a = [row(f"c{case}", dsc=0.5, seed=seed) for seed in range(3) for case in range(4)]
    b = [
        row(f"c{case}", dsc=0.5 + 0.1 * seed + 0.01 * case, seed=seed)
        for seed in range(3)
        for case in range(4)
    ]
    liver, _ = compare(a, b)
    assert liver.num_pairs == 12
    assert liver.difference == pytest.approx(0.115)
    expected = bootstrap_interval(np.add.outer([0, 0.1, 0.2], [0, 0.01, 0.02, 0.03]))
    assert liver.interval == pytest.approx(expected)
    assert liver.p_value == pytest.approx(2 / 2**4)


def test_holm_over_the_organs():
    # p = 2 / 2**n for n positive differences: 0.0625, 0.5 and 0.03125; times 2, 1 and 3, never falling
    a = run([0.1] * 5, "x") + run([0.1] * 2, "y") + run([0.1] * 6, "z")
    b = run([0.2, 0.3, 0.4, 0.5, 0.6], "x") + run([0.2, 0.3], "y") + run([0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "z")
    lines = {line.organ: line.p_holm for line in compare(a, b)}
    assert [lines[organ] for organ in "xyz"] == pytest.approx([0.125, 0.5, 0.09375])


def test_comparisons_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="share no case"):
        compare([row("a")], [row("b")])
    with pytest.raises(ValueError, match=r"\['FLARE22', 'plain'\] do not compare"):
        compare([row("a")], [row("a") | {"protocol": "FLARE22"}])
    with pytest.raises(ValueError, match="Run B scores the liver of case 'a' twice"):
        compare([row("a")], [row("a"), row("a")])
    with pytest.raises(ValueError, match="Run A has a row without the number 'nsd'"):
        compare([row("a")], [row("a")], "nsd")


# -- one run ------------------------------------------------------------------------------------------


def test_summary_by_hand():
    rows = [*run([0.5, 0.7, 0.9]), row("c0", "spleen", 0.1), row("c1", "spleen", math.nan, "absent")]
    liver, spleen, overall = summarise(rows)
    assert (liver.mean, liver.num_scores) == (pytest.approx(0.7), 3)
    assert (spleen.mean, spleen.num_scores, spleen.counts["absent"]) == (0.1, 1, 1)
    assert overall.mean == pytest.approx((0.3 + 0.7 + 0.9) / 3)
    assert (overall.num_scores, overall.counts["absent"], overall.counts["without a score"]) == (3, 1, 1)


def test_five_folds_merge_and_a_case_in_two_is_refused():
    folds = [
        [row(f"c{fold}{case}", organ) for case in range(2) for organ in ("liver", "spleen")]
        for fold in range(5)
    ]
    merged = merge_folds(folds)
    assert len(merged) == 20
    assert {(r["case"][1], r["fold"]) for r in merged} == {(str(fold), fold) for fold in range(5)}
    with pytest.raises(ValueError, match="Case 'c10' is in fold 1 and in fold 5"):
        merge_folds([*folds, folds[1]])


def test_worst_rows_come_first():
    rows = [
        row("good", dsc=0.9, hd95=1.0),
        row("small", dsc=0.0, hd95=math.inf, reference_ml=2.0),
        row("large", dsc=0.0, hd95=math.inf, reference_ml=90.0),
        row("fair", dsc=0.6, hd95=8.0),
        row("absent", dsc=math.nan, hd95=math.nan),
    ]
    for metric in ("dsc", "hd95"):
        assert [r["case"] for r in worst_rows(rows, metric)] == ["large", "small", "fair", "good"]


# -- text ---------------------------------------------------------------------------------------------


def test_markdown_holds_every_line_and_names_every_count():
    a, b = [*run([0.5, 0.6, 0.7]), row("x")], run([0.6, 0.8, 0.7])
    text = to_markdown(compare(a, b), name_a="scratch|1", name_b="alice", metric="dsc")
    assert "| liver | 3 | 0.6000 | 0.7000 | +0.1000 | [" in text
    assert "1 only in A |" in text
    assert "A: scratch\\|1 and B: alice" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {10}


def test_what_is_not_known_is_a_dash():
    nothing = compare([row("a", dsc=math.nan)], [row("a", dsc=0.3)])
    assert table_cells(nothing)[0] == ["liver", "0", "–", "–", "–", "–", "–", "–", "1 without a score"]
