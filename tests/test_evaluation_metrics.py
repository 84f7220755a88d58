"""Metrics: worked by hand, and laws that hold for any masks, maps and answers."""

import numpy as np
import pytest
import torch

from perceptio.evaluation.benchmark import Judgement, mean, ratio, share
from perceptio.evaluation.metrics import (
    abs_rel,
    align_scale_shift,
    bootstrap_ratio,
    ciou,
    delta1,
    exact_answer,
    giou,
    iou,
    overlap,
    parse_letter,
    precision_at,
    wilson,
)
from perceptio.vqvae.evaluate import relative_errors

RNG = np.random.default_rng(0)


def square(side: int, size: int = 8) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[:side, :side] = True
    return mask


# Masks


def test_masks_by_hand():
    pairs = [overlap(square(2), square(4)), overlap(square(4), square(4)), overlap(square(0), square(2))]
    assert pairs == [(4, 16), (16, 16), (0, 4)]
    assert ciou(pairs) == 20 / 36 and giou(pairs) == pytest.approx((0.25 + 1 + 0) / 3)
    assert precision_at(pairs, 0.5) == pytest.approx(1 / 3) and precision_at(pairs, 0.25) == pytest.approx(2 / 3)


def test_nothing_on_nothing_is_right_and_adds_nothing_to_the_sums():
    empty = overlap(square(0), square(0))
    assert empty == (0, 0) and iou(*empty) == 1 and ciou([empty, empty]) == 1
    pairs = [(4, 16), (3, 5)]
    assert ciou([*pairs, empty]) == ciou(pairs) and giou([*pairs, empty]) > giou(pairs)
    assert iou(*overlap(square(1), square(0))) == 0


def test_equal_masks_score_one_and_order_does_not_count():
    masks = RNG.random((20, 9, 7)) < 0.4
    assert ciou([overlap(mask, mask) for mask in masks]) == giou([overlap(mask, mask) for mask in masks]) == 1
    pairs = [overlap(a, b) for a, b in zip(masks, masks[::-1], strict=True)]
    shuffled = [pairs[index] for index in RNG.permutation(20)]
    assert ciou(pairs) == ciou(shuffled) and giou(pairs) == giou(shuffled)


def test_masks_of_two_sizes_are_no_pair():
    with pytest.raises(ValueError, match=r"shapes \(8, 8\) and \(4, 4\)"):
        overlap(square(2), square(2, 4))


# Depth


def test_depth_by_hand():
    true, found = np.array([[0.9, 0.4]]), np.array([[0.9, 0.15]])  # z* = 1, 2; z = 1, 4
    assert abs_rel(found, true) == pytest.approx(0.5) and delta1(found, true) == 0.5


def test_depth_is_measured_as_that_of_the_tokenizer_is():
    found, true = RNG.random((2, 12, 10))
    expected = [value.item() for value in relative_errors(torch.tensor(found)[None], torch.tensor(true)[None])]
    assert [abs_rel(found, true), delta1(found, true)] == pytest.approx(expected)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.3, 0.2), (-2, 1), (100, -7)])
def test_alignment_recovers_scale_and_shift(scale, shift):
    found = RNG.random((13, 17))
    true = scale * found + shift
    true[0, :5] = np.nan
    assert align_scale_shift(found, true) == pytest.approx((scale, shift))


def test_alignment_is_the_best_there_is():
    found, true = RNG.random((2, 9, 9))
    scale, shift = align_scale_shift(found, true)

    def error(a, b):
        return ((a * found + b - true) ** 2).sum()

    assert all(error(scale, shift) <= error(scale + a, shift + b) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01))


def test_odd_depth_has_a_defined_answer():
    true = RNG.random((4, 4)).astype(np.float32)
    assert align_scale_shift(np.full((4, 4), 0.7), true) == (0, pytest.approx(true.mean()))
    holes = true.copy()
    holes[2:] = np.nan
    noise = np.where(np.isnan(holes), 0.123, true)
    assert delta1(noise, holes) == 1 and abs_rel(noise, holes) == 0
    assert np.isfinite(abs_rel(true - 5, true)), "values below 0 are cut"
    for function in (align_scale_shift, abs_rel, delta1):
        with pytest.raises(ValueError, match="no value anywhere"):
            function(true, np.full((4, 4), np.nan))


# Answers


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("Yes.", "yes", True),
        ("The red  cup.", "red cup", True),
        (' "Left" ', "LEFT!", True),
        ("３.", "3", True),
        ("a", "", False),
        ("theatre", "atre", False),
        ("3", "three", False),
        ("Yes, there is.", "Yes", False),
        ("the", "a", False),
    ],
)
def test_exact_answers(left, right, equal):
    assert (exact_answer(left) == exact_answer(right)) is equal


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (text, "B")
            for text in ("B", " B\n", "(B)", "B.", "(B).", "B)", "B:", "(B) the red cup", "B. A cup is red")
        ),
        *(
            (text, None)
            for text in ("", "b", "BC", "The answer is B", "A cup", "(A) or (B)", "A. B", "(E)", "(B", "?")
        ),
    ],
)
def test_letters_are_read_strictly(text, letter):
    assert parse_letter(text, "ABCD") == letter


# Intervals


def test_wilson_by_hand():
    assert wilson([True] * 5 + [False] * 5) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert wilson([True] * 10) == pytest.approx((1, 0.722467, 1), abs=1e-6)
    assert wilson([]) == (None, None, None)


def test_items_of_one_group_count_as_one():
    hits = [True, True, False, False] * 5
    alone = wilson(hits)
    assert wilson(hits, range(20)) == alone
    assert wilson(hits, [index // 2 for index in range(20)]) == pytest.approx(wilson(hits[::2]), abs=0.02)
    value, low, high = wilson([True] * 40, [index // 20 for index in range(40)])
    assert (value, low, high) == wilson([True] * 2)
    tops, ones = [float(hit) for hit in hits], [1.0] * 20
    wide = bootstrap_ratio(tops, ones, [index // 2 for index in range(20)])
    narrow = bootstrap_ratio(tops, ones)
    assert wide[0] == narrow[0] and wide[2] - wide[1] > narrow[2] - narrow[1]


@pytest.mark.parametrize("seed", range(20))
def test_an_interval_holds_its_value_and_no_order_changes_it(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    tops, bottoms = rng.random(n) ** 8, rng.random(n) + 0.1
    groups = rng.integers(0, max(2, n // 3), n).tolist()
    order = rng.permutation(n)
    for own in (None, groups):
        value, low, high = bootstrap_ratio(tops, bottoms, own)
        assert low is None or low <= value <= high
        mixed = None if own is None else [own[index] for index in order]
        assert bootstrap_ratio(tops[order], bottoms[order], mixed) == (value, low, high)
        hits = (tops > 0.3).tolist()
        value, low, high = wilson(hits, own)
        assert 0 <= low <= value <= high <= 1
        assert wilson([hits[index] for index in order], mixed) == pytest.approx((value, low, high), abs=1e-12)


def test_the_bootstrap_is_as_wide_as_theory_has_it():
    values = np.random.default_rng(1).normal(5, 2, 400)
    _, low, high = bootstrap_ratio(values, np.ones(400))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_one_item_has_no_bootstrap():
    assert bootstrap_ratio([3.0], [4.0]) == (0.75, None, None) and bootstrap_ratio([], []) == (None, None, None)


# Figures


def test_figures_count_what_they_are_about():
    rows = [
        Judgement("a", {"right": True, "error": 0.5, "top": 4, "bottom": 16}),
        Judgement("b", {"right": False, "error": None, "top": 0, "bottom": 4}, invalid="no span"),
        Judgement("c", {"top": 16, "bottom": 16}),
    ]
    right = share("accuracy", rows, "right")
    assert (right.value, right.n, right.invalid, right.unit) == (50, 2, 1, "%")
    error = mean("AbsRel", rows, "error", unit="")
    assert (error.value, error.n, error.invalid, error.low) == (0.5, 1, 1, None)
    assert ratio("cIoU", rows, "top", "bottom").value == pytest.approx(100 * 20 / 36)
    assert share("none", rows, "absent").cells() == ("none", "–%", "–", "0", "0")
    assert right.cells()[1:3] == ("50.0%", "9.5 – 90.5")
