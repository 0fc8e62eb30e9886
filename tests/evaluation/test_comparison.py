from __future__ import annotations

import itertools
import secrets

import numpy as np
import pytest
from scipy.stats import wilcoxon

from data_prep.errors import UserError
from medpretrain.evaluation.comparison import compare, holm, least_p, signed_rank
from medpretrain.evaluation.intervals import bootstrap_difference
from medpretrain.evaluation.metrics import metrics
from medpretrain.evaluation.results import DataRecord, Evaluation, Predictions, SourceRecord, Unit

CLASSES = ["normal", "lesion"]


def evaluated(
    name: str,
    skill: float,
    rng: np.random.Generator,
    *,
    repeats: int = 6,
    seeds: tuple[int, ...] = (0,),
    fractions: tuple[float, ...] = (100,),
    chance: bool = True,
    **changes: object,
) -> tuple[Evaluation, Predictions]:
    """Two folds of 30 patients; the higher the skill, the better the scores; without chance repeats are copies."""
    label = np.arange(30) % 2
    fixed = rng.normal(skill * (2 * label - 1), 1)
    units, parts = [], []
    for fraction, seed, repeat, fold in itertools.product(fractions, seeds, range(repeats), range(2)):
        inside = np.flatnonzero(np.arange(30) // 2 % 2 == fold)
        drawn = fixed + (rng.normal(0, 0.3, 30) if chance else 0)
        lesion = 1 / (1 + np.exp(-drawn[inside]))
        scores = np.stack([1 - lesion, lesion], axis=1)
        n, number = len(inside), len(units)
        of = label[inside].astype(np.int32)
        parts.append(Predictions(np.full(n, number, np.int32), inside, inside + 5, of, scores))
        units.append(
            Unit(
                number=number,
                fraction=fraction,
                seed=seed,
                repeat=repeat,
                fold=fold,
                n_train=15,
                n_val=0,
                n_test=n,
                parameters={},
                metrics=metrics(scores, of, CLASSES),
            )
        )
    data = DataRecord(
        name="breast",
        sha256="d",
        label="class",
        classes=CLASSES,
        train_split="train",
        test_split="test",
        test_name="breast",
        test_sha256="d",
        train_counts=[15, 15],
        test_counts=[15, 15],
        left_out={},
        patients="known",
    )
    evaluation = Evaluation(
        protocol="linear",
        variant="exact",
        parameters={"C": 1.0},
        source=SourceRecord(name=name, kind="run", sha256=name, architecture="resnet18", about={}),
        data=data,
        folds=2,
        repeats=repeats,
        seeds=list(seeds),
        units=units,
        summaries=[],
        seconds=1.0,
        device="cpu",
        medpretrain_version="0",
    )
    return evaluation.model_copy(update=changes), Predictions.joined(parts)


def generator() -> np.random.Generator:
    seed = secrets.randbits(32)
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 25])
def test_signed_rank_equals_scipy_without_ties(n: int) -> None:
    difference = generator().normal(0.5, 1, n)
    expected = wilcoxon(difference, method="exact")
    assert signed_rank(difference) == pytest.approx((expected.statistic, expected.pvalue), abs=1e-12)


@pytest.mark.parametrize("n", [3, 7, 10])
def test_signed_rank_with_ties_and_zeros_counts_all_signs(n: int) -> None:
    difference = generator().integers(-3, 5, n) / 10
    kept = difference[difference != 0]
    ranks = [(sum(abs(o) < abs(d) for o in kept) + sum(abs(o) <= abs(d) for o in kept) + 1) / 2 for d in kept.tolist()]
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    above = sum(r for r, d in zip(ranks, kept, strict=True) if d > 0)
    smaller = min(above, sum(ranks) - above)
    p = min(1.0, 2 * sum(s <= smaller for s in sums) / len(sums))
    assert signed_rank(difference) == pytest.approx((smaller, p), abs=1e-12)


def test_equal_differences_cannot_go_below_the_least_p() -> None:
    # The normal approximation with its correction for ties says 0.083 of these three.
    assert signed_rank(np.array([0.2, 0.2, 0.2])) == (0.0, 0.25)


def test_differences_that_are_equal_but_for_rounding_are_ties() -> None:
    assert signed_rank(np.array([0.3 - 0.2, -(0.2 - 0.1), 0.5])) == signed_rank(np.array([0.1, -0.1, 0.5]))


def test_no_difference_is_no_finding() -> None:
    assert signed_rank(np.zeros(12)) == (0.0, 1.0)


def test_more_pairs_than_can_be_listed() -> None:
    difference = generator().normal(0.1, 1, 200)
    expected = wilcoxon(difference, method="asymptotic", correction=True)
    assert signed_rank(difference)[1] == pytest.approx(expected.pvalue, abs=2e-3)


def test_holm_equals_its_definition() -> None:
    p = generator().random(7) ** 2
    rejected_at = []
    # The smallest level at which the procedure rejects each: walk up the sorted values while p <= level / (m - i).
    levels = sorted({min(1.0, (7 - i) * value) for i in range(7) for value in p.tolist()})
    for place in range(7):
        for level in levels:
            rejected = []
            for i, other in enumerate(sorted(range(7), key=lambda o: p[o])):
                if p[other] * (7 - i) > level * (1 + 1e-12):
                    break
                rejected.append(other)
            if place in rejected:
                rejected_at.append(level)
                break
        else:
            rejected_at.append(1.0)
    assert holm(p.tolist()) == pytest.approx(rejected_at, abs=1e-12)
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_each_pair_is_tested_on_the_means_of_its_repeats() -> None:
    rng = generator()
    methods = [evaluated(name, skill, rng) for name, skill in (("ssl", 1.5), ("supervised", 0.7), ("random", 0.1))]
    found = compare(methods, metrics=("auroc", "brier"), resamples=100, seed=2)
    assert [(one.metric, one.first, one.second) for one in found] == [
        (metric, *pair)
        for metric in ("auroc", "brier")
        for pair in (("ssl", "supervised"), ("ssl", "random"), ("supervised", "random"))
    ]
    values = {
        evaluation.source.name: [
            np.mean([u.metrics.auroc for u in evaluation.units if u.repeat == repeat]) for repeat in range(6)
        ]
        for evaluation, _ in methods
    }
    expected = [signed_rank(np.subtract(values[one.first], values[one.second])) for one in found[:3]]
    assert [(one.statistic, one.p) for one in found[:3]] == expected
    assert [one.p_holm for one in found[:3]] == holm([p for _, p in expected])
    for one in found[:3]:
        assert one.difference == pytest.approx(np.mean(values[one.first]) - np.mean(values[one.second]), abs=1e-12)
        assert (one.pairs, one.copies, one.family, one.least_p) == (6, 0, 3, 2 / 64)
        assert one.least_p_holm == 6 / 64
        assert not one.significant
    first, second = methods[0], methods[1]
    assert (
        found[0].interval
        == bootstrap_difference(first[1], second[1], CLASSES, (first[0].units, second[0].units), resamples=100, seed=2)[
            "auroc"
        ]
    )


def test_each_against_a_reference() -> None:
    rng = generator()
    methods = [evaluated(name, 0.5, rng, repeats=2) for name in ("a", "b", "c")]
    found = compare(methods, reference="b", resamples=0)
    assert [(one.first, one.second) for one in found] == [("b", "a"), ("b", "c")]
    assert all(one.family == 2 and one.interval is None for one in found)


def test_three_repeats_are_never_significant() -> None:
    rng = generator()
    (one,) = compare([evaluated("good", 5, rng, repeats=3), evaluated("bad", -5, rng, repeats=3)], resamples=100)
    assert one.interval is not None
    assert one.interval.low > 0.5
    assert (one.p, one.least_p) == (0.25, 0.25)
    assert not one.significant


def test_enough_repeats_of_a_clear_difference_are_significant() -> None:
    rng = generator()
    (one,) = compare([evaluated("good", 1, rng), evaluated("bad", -1, rng)], resamples=0)
    assert one.p_holm == 2 / 64
    assert one.significant


def test_seeds_are_pairs_where_they_are_what_is_repeated() -> None:
    rng = generator()
    runs = [evaluated(name, 0.5, rng, repeats=1, seeds=(0, 1, 2, 3)) for name in "ab"]
    assert compare(runs, resamples=0)[0].pairs == 4


def test_repeats_without_chance_count_once() -> None:
    rng = generator()
    (one,) = compare([evaluated(name, 2 - 3 * k, rng, chance=False) for k, name in enumerate("ab")], resamples=0)
    assert (one.pairs, one.copies, one.p) == (1, 5, 1.0)
    assert not one.significant


def test_fractions_are_compared_apart() -> None:
    rng = generator()
    found = compare([evaluated(name, 0.5, rng, repeats=2, fractions=(1, 10)) for name in "abc"], resamples=0)
    assert [(one.fraction, one.family) for one in found] == [(1, 3)] * 3 + [(10, 3)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "knn"}, "protocol .'linear' and 'knn'."),
        ({"parameters": {"C": 2.0}}, r"parameters.C .1.0 and 2.0."),
        ({"seeds": [3]}, r"seeds .\[0\] and \[3\]."),
    ],
)
def test_what_differs_is_named(changes: dict[str, object], message: str) -> None:
    rng = generator()
    with pytest.raises(UserError, match=f"'a' and 'b' cannot be compared, they differ in {message}"):
        compare([evaluated("a", 1, rng), evaluated("b", 1, rng, **changes)], resamples=0)


def test_another_test_set_is_named() -> None:
    rng = generator()
    first, second = evaluated("a", 1, rng), evaluated("b", 1, rng)
    data = second[0].data.model_copy(update={"test_sha256": "e"})
    with pytest.raises(UserError, match=r"data\.test_sha256 .'d' and 'e'."):
        compare([first, (second[0].model_copy(update={"data": data}), second[1])], resamples=0)


def test_other_units_are_refused() -> None:
    rng = generator()
    first, second = evaluated("a", 1, rng), evaluated("b", 1, rng)
    fewer = second[0].model_copy(update={"units": second[0].units[:-2]})
    with pytest.raises(UserError, match="differ in their units"):
        compare([first, (fewer, second[1])], resamples=0)


@pytest.mark.parametrize("resamples", [0, 100])
def test_predictions_of_other_patients_are_refused(resamples: int) -> None:
    rng = generator()
    first, second = evaluated("a", 1, rng), evaluated("b", 1, rng)
    second[1].patient_R[:] += 1
    with pytest.raises(UserError, match="their test patients differ"):
        compare([first, second], resamples=resamples)


def test_too_few_sources_equal_names_and_unknown_words_are_refused() -> None:
    rng = generator()
    one, two = evaluated("a", 1, rng, repeats=1), evaluated("b", 1, rng, repeats=1)
    with pytest.raises(UserError, match="at least two sources"):
        compare([one])
    with pytest.raises(UserError, match="have the name 'a'"):
        compare([one, one])
    with pytest.raises(UserError, match="no metric 'auc'; did you mean 'auroc'"):
        compare([one, two], metrics=("auc",))
    with pytest.raises(UserError, match="no source 'c'"):
        compare([one, two], reference="c")


def test_least_p_halves_with_each_pair() -> None:
    assert [least_p(n) for n in (1, 3, 6)] == [1.0, 0.25, 0.03125]
