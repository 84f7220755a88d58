"""Answers of one letter or one word: what is read, what is wrong, and means over categories."""

import pytest

from perceptio.evaluation.benchmark import Item, Judgement, Prediction, open_benchmark
from perceptio.evaluation.choice import BENCHMARKS
from perceptio.evaluation.choice.common import Choice, macro, options_of
from perceptio.evaluation.metrics import parse_letter, parse_yes_no, wilson
from perceptio.evaluation.run import Settings, run_benchmark


class Says:
    """A predictor whose answer is a function of the item, or always one text; keeps what it was asked."""

    decode = None

    def __init__(self, answer, fail_at: int | None = None):
        self.answer, self.fail_at, self.asked = answer, fail_at, []

    def __call__(self, tasks):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [task.item for task in tasks]
        texts = [self.answer if isinstance(self.answer, str) else self.answer(task.item) for task in tasks]
        return [Prediction(t.item.id, t.perception, text) for t, text in zip(tasks, texts, strict=True)]


def right(item: Item) -> str:
    return item.truth["answer"]


def evaluate(name: str, data, out, answer=right, split=None, predictor=None, **settings) -> dict:
    benchmark = open_benchmark(name)
    settings = Settings(split or benchmark.splits[0], **settings)
    return run_benchmark(benchmark, predictor or Says(answer), data, out, settings, {})


def figures(results: dict, field: str = "value") -> dict:
    return {figure["name"]: figure[field] for figure in results["figures"]}


def judged(id: str, right: bool, category: str, group=None, invalid=None) -> Judgement:
    return Judgement(id, {"right": right, "category": category}, invalid, group=group)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (text, True)
            for text in ("Yes", " yes\n", "YES.", "Yes, there is a dog.", "yes! It is not", "Yes.\nIt is.")
        ),
        *((text, False) for text in ("No", "no.", "No, there is no dog.", "NO:", "No; nobody")),
        *((text, None) for text in ("", "Yes it is", "No idea", "Nothing", "There is.", "y", "Yes and no", "yesno")),
        *((text, None) for text in ("Yes. No.", "No, yes", "Answer: yes", "(Yes)", "Yes,no")),
    ],
)
def test_yes_and_no_are_read_strictly(text, said):
    assert parse_yes_no(text) is said


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("A. vitamin C", "A"),
        ("(A) Vitamin C.", "A"),
        ("B. vitamin C", None),
        ("A. It is C", None),
        ("(B) A is closer", None),
        ("(C) B is closer", "C"),
        ("D. anything", "D"),
        ("E", None),
    ],
)
def test_the_words_of_an_option_are_its_own(text, letter):
    """Without them "A. vitamin C" names two letters, and "B. vitamin C" hides that it contradicts itself."""
    assert parse_letter("A. vitamin C", "ABCD") is None and parse_letter("B. vitamin K", "ABCD") == "B"
    options = {"A": "Vitamin C", "B": "A cup", "C": "B is closer", "D": "A is closer"}
    assert parse_letter(text, "ABCD", options) == letter


def test_what_cannot_be_read_is_wrong_and_invalid():
    benchmark = Choice()
    item = benchmark.ask("a", "?", [b"x"], options_of(["red", "blue"]), "B", kind="colour")
    assert (item.perception, item.truth["answer"]) == ("seg+depth", "(B) blue")

    def judge(text: str, error=None):
        found = benchmark.judge(item, Prediction("a", "none", text, error=error))
        return found.values, found.invalid, found.quality

    assert judge("B") == ({"right": True, "kind": "colour"}, None, 1)
    assert judge("(A) red") == ({"right": False, "kind": "colour"}, None, 0)
    for text in ("", "blue", "C", "It is B"):
        assert judge(text) == ({"right": False, "kind": "colour"}, "no letter that can be read", 0)
    assert judge("", "damaged picture")[1] == "damaged picture"
    assert judge("B", "damaged picture")[0]["right"] is False


def test_questions_with_several_pictures_are_asked_without_perception():
    assert Choice().ask("a", "?", [b"x", b"y"], options_of("ab"), "A").perception == "none"


def test_categories_count_the_same_whatever_their_size():
    rows = [judged(f"a{i}", True, "a") for i in range(9)] + [judged("b0", False, "b", invalid="no letter")]
    figure = macro("mean", rows, "right", "category")
    assert figure.value == pytest.approx(50) and (figure.n, figure.invalid) == (10, 1)
    assert 0 <= figure.low < 20 and 80 < figure.high <= 100, "one question alone decides half of it"


def test_the_interval_of_equal_categories_is_that_of_all():
    rows = [judged(f"{c}{i}", i % 3 == 0, c) for c in "ab" for i in range(60)]
    value, low, high = wilson([row.values["right"] for row in rows])
    figure = macro("mean", rows, "right", "category")
    assert figure.value == pytest.approx(100 * value)
    assert (figure.low, figure.high) == pytest.approx((100 * low, 100 * high), abs=0.2)
    grouped = macro("mean", [judged(r.id, r.values["right"], r.values["category"], r.id[1:]) for r in rows], *KEYS)
    assert grouped.high - grouped.low > 1.2 * (figure.high - figure.low), "the same 60 pictures twice"


KEYS = ("right", "category")


@pytest.mark.parametrize("hit", [True, False])
def test_the_interval_of_none_or_all_is_no_point(hit):
    figure = macro("mean", [judged(str(i), hit, "ab"[i % 2]) for i in range(8)], *KEYS)
    assert figure.high - figure.low > 30 and figure.value == 100 * hit


def test_all_benchmarks_of_choice_are_offered():
    assert set(BENCHMARKS) == {"hardblink", "blink", "mmbench", "seed-bench", "mme"}
    for name in BENCHMARKS:
        assert open_benchmark(name).name == name
