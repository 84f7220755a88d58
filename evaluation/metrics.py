"""The numbers, as pure functions.  Shares lie between 0 and 1 here; figures are printed in percent.

Nothing depends on the order of the items: sums are exact, and what is resampled is sorted first.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from ..vqvae.evaluate import OFFSET

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
RESAMPLES, SEED = 2000, 0
NORMAL_95 = 1.959963984540054

# Masks


def overlap(found: np.ndarray, true: np.ndarray) -> tuple[int, int]:
    """(pixels of the intersection, pixels of the union) of bool[H, W]."""
    if found.shape != true.shape:
        raise ValueError(f"the masks have shapes {found.shape} and {true.shape}, expected one: compare one picture")
    return int(np.count_nonzero(found & true)), int(np.count_nonzero(found | true))


def iou(intersection: int, union: int) -> float:
    """Of two empty masks it is 1: what is not there was rightly left out."""
    return intersection / union if union else 1.0


def giou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Mean IoU of the items, empty on empty counting 1."""
    return math.fsum(iou(*pair) for pair in overlaps) / len(overlaps)


def ciou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Sum of the intersections over sum of the unions.  Empty on empty adds to neither; if all are, it is 1."""
    return iou(sum(pair[0] for pair in overlaps), sum(pair[1] for pair in overlaps))


def precision_at(overlaps: Sequence[tuple[int, int]], threshold: float) -> float:
    """Share of the items whose IoU is at least the threshold."""
    return sum(iou(*pair) >= threshold for pair in overlaps) / len(overlaps)


# Depth: relative inverse depth v in [0, 1], NaN in `true` where there is none


def align_scale_shift(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """(scale, shift) for which scale · found + shift is nearest to `true` in inverse depth, by least squares.

    Of a constant map the scale is 0.
    """
    valid = ~np.isnan(true)
    if not valid.any():
        raise ValueError("the true depth has no value anywhere, expected some: leave the picture out")
    x, y = found[valid].astype(np.float64), true[valid].astype(np.float64)
    spread = x - x.mean()
    variance = float(spread @ spread)
    scale = float(spread @ y) / variance if variance > 1e-12 * len(x) else 0.0
    return scale, float(y.mean() - scale * x.mean())


def depth_errors(found: np.ndarray, true: np.ndarray, offset: float = OFFSET) -> tuple[float, float]:
    """(AbsRel, delta1) of the depth z = 1 / (v + offset), over the pixels that have a true value.

    Inverse depth without a scale has no AbsRel: with the offset the farthest point of a picture lies
    (1 + offset) / offset times as far away as the nearest.  Values below 0, as an alignment gives, are cut to 0.
    """
    valid = ~np.isnan(true)
    if not valid.any():
        raise ValueError("the true depth has no value anywhere, expected some: leave the picture out")
    found = np.maximum(found[valid].astype(np.float64), 0)
    share = (true[valid].astype(np.float64) + offset) / (found + offset)  # found depth over true depth
    return float(np.abs(share - 1).mean()), float((np.maximum(share, 1 / share) < 1.25).mean())


def abs_rel(found: np.ndarray, true: np.ndarray, offset: float = OFFSET) -> float:
    """Mean of |z - z*| / z*; see `depth_errors`."""
    return depth_errors(found, true, offset)[0]


def delta1(found: np.ndarray, true: np.ndarray, offset: float = OFFSET) -> float:
    """Share of the pixels with max(z / z*, z* / z) < 1.25; see `depth_errors`."""
    return depth_errors(found, true, offset)[1]


# Answers


def exact_answer(text: str) -> str:
    """An answer as it is compared: Unicode in NFKC, without case, single spaces, no article before it and no
    punctuation, quotation marks or brackets around it.  "The red cup." and "red cup" are equal, "3" and "three" not.
    """
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    words = _bare(words)
    article = re.match(r"(?:a|an|the) (?=\S)", words)
    return _bare(words[article.end() :]) if article else words


def _bare(text: str) -> str:
    return text.strip(" .,;:!?\"'`()[]{}«»“”‘’…*_")


def parse_letter(text: str, letters: str, options: Mapping[str, str] | None = None) -> str | None:
    """The one option that an answer names, or None where it cannot be read.

    letters: the options, as "ABCD".  Read are the letter alone, in brackets or not, with . : ) behind it, and the
    same before the words of the option: "B", "(B)", "B.", "(B) the red cup", "B. the red cup".  Nothing else is:
    not "b", "The answer is B", "A cup", nor an answer in whose words another option stands alone ("(A) or (B)").
    options: letter → the words of each.  Words that are the named option's own then hold no other ("A. vitamin C"),
    and those of another option alone contradict the letter.
    """
    found = re.fullmatch(r"(?:\(([A-Z])\)[.:]?|([A-Z])[.:)]*)(?:(?<=[.:)])\s+(\S.*))?", text.strip(), re.DOTALL)
    if found is None:
        return None
    letter, words = found[1] or found[2], found[3] or ""
    if letter not in letters:
        return None
    if words and options:
        named = {key for key, own in options.items() if exact_answer(own) == exact_answer(words)}
        if named:
            return letter if letter in named else None
    others = set(re.findall(r"(?<!\w)([A-Z])(?=[.:)]|$)", words)) - {letter}
    return letter if not others & set(letters) else None


def parse_yes_no(text: str) -> bool | None:
    """True for yes, False for no, None where it cannot be read.

    Read are the word alone in any case, with . , ; : ! behind it, and the same before an explanation: "Yes", "no.",
    "Yes, there is a dog."  Nothing else is: not "Yes it is", "No idea", "There is", nor an answer in whose
    explanation the other word stands ("Yes and no", "No. Yes.").
    """
    found = re.fullmatch(r"(yes|no)[.,;:!]*(?:(?<=[.,;:!])\s+(\S.*))?", text.strip().casefold(), re.DOTALL)
    if found is None:
        return None
    other = "no" if found[1] == "yes" else "yes"
    return None if re.search(rf"\b{other}\b", found[2] or "") else found[1] == "yes"


# Intervals of 95%


def wilson(
    hits: Sequence[float], groups: Sequence | None = None, weights: Sequence[float] | None = None
) -> tuple[float | None, float | None, float | None]:
    """(share, low, high) of a proportion, by Wilson's score interval.

    hits: for each item whether it is one, or how much of one, from 0 to 1.
    groups: for each item what it belongs to; items of one group are not independent, so that the number of items is
    replaced by the one that would vary as much (of groups, where all hit or none does).
    weights: what each item counts for; likewise.
    """
    n = len(hits)
    if n == 0:
        return None, None, None
    if groups is None and weights is None:
        value, size = sum(hits) / n, n
    else:
        ones = np.ones(n) if weights is None else np.asarray(weights, np.float64)
        whole = np.asarray(hits, np.float64) * ones
        value = math.fsum(whole) / math.fsum(ones)
        size = _independent(whole, ones, value, range(n) if groups is None else groups, weights is not None)
    z2 = NORMAL_95**2
    middle = (value + z2 / (2 * size)) / (1 + z2 / size)
    half = NORMAL_95 * math.sqrt(value * (1 - value) / size + z2 / (4 * size**2)) / (1 + z2 / size)
    return value, max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def _independent(hits: np.ndarray, ones: np.ndarray, value: float, groups: Sequence, weighed: bool) -> float:
    """How many independent items vary as much as these do."""
    tops, counts = _sums(hits, ones, groups)
    n, k = len(hits), len(counts)
    if k == 1 or (k == n and not weighed):
        return k
    variance = k / (k - 1) * math.fsum((tops - value * counts) ** 2) / math.fsum(ones) ** 2
    if value in (0.0, 1.0) or variance == 0:
        return k
    return min(max(value * (1 - value) / variance, 1.0), n)


def bootstrap_ratio(
    tops: Sequence[float], bottoms: Sequence[float], groups: Sequence | None = None
) -> tuple[float | None, float | None, float | None]:
    """(sum of tops / sum of bottoms, low, high) by the bootstrap's percentiles; a mean has ones for bottoms.

    Whole groups are drawn with a fixed seed.  The interval is widened to hold the value itself; there is none for
    fewer than two groups.  0 / 0 is 1, as for masks that are all empty.
    """
    if len(tops) == 0:
        return None, None, None
    tops, bottoms = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    value = _quotient(math.fsum(tops), math.fsum(bottoms))
    if groups is not None:
        tops, bottoms = _sums(tops, bottoms, groups)
    k = len(tops)
    if k < 2:
        return value, None, None
    order = np.lexsort((bottoms, tops))
    both = np.stack([tops[order], bottoms[order]], axis=1)
    rng = np.random.default_rng(SEED)
    drawn = []
    for start in range(0, RESAMPLES, 100):
        counts = rng.multinomial(k, np.full(k, 1 / k), size=min(100, RESAMPLES - start))
        drawn += [_quotient(top, bottom) for top, bottom in counts @ both]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return value, min(float(low), value), max(float(high), value)


def _quotient(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else 1.0


def _sums(tops: np.ndarray, bottoms: np.ndarray, groups: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Both summed within each group."""
    parts: dict = {}
    for top, bottom, group in zip(tops, bottoms, groups, strict=True):
        parts.setdefault(group, []).append((top, bottom))
    summed = [(math.fsum(t for t, _ in part), math.fsum(b for _, b in part)) for part in parts.values()]
    return tuple(np.array(column) for column in zip(*summed, strict=True))
