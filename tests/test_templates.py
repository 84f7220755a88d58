"""Wordings: complete, without control tokens, and chosen the same way everywhere."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceptio.data import templates
from perceptio.data.templates import choose, clean_phrase, fill, has_control_token

FILLED = ("REFERRING_QUESTIONS", "DESCRIPTION_QUESTIONS", "REFERRING_ANSWERS", "NO_TARGET_ANSWERS", "PHRASE_SENTENCES")


@pytest.mark.parametrize("name", FILLED)
def test_every_wording_is_a_sentence_with_one_place(name):
    wordings = getattr(templates, name)
    assert len(set(wordings)) == len(wordings) >= 4
    for wording in wordings:
        assert wording.count("{}") == 1 and not has_control_token(wording)
        assert wording == wording.strip() and wording[0].isupper() and wording[-1] in ".?!"


def test_the_paper_s_base_form_is_one_of_the_questions():
    assert fill(templates.REFERRING_QUESTIONS[0], "the left cup") == "Please segment the left cup in this image."


def test_the_choice_is_fixed():
    """A change here changes every data set that was written with a seed."""
    picks = [choose(templates.REFERRING_QUESTIONS, 0, "refcoco/unc/train/581857", turn) for turn in range(4)]
    assert [templates.REFERRING_QUESTIONS.index(pick) for pick in picks] == EXPECTED


EXPECTED = [5, 5, 7, 6]


def test_seed_record_and_turn_each_change_the_choice_and_all_wordings_occur():
    wordings = templates.REFERRING_QUESTIONS
    base = [choose(wordings, 0, f"r/{n}", 1) for n in range(2000)]
    assert min(Counter(base).values()) > 120 and len(set(base)) == len(wordings)
    for changed in (
        [choose(wordings, 1, f"r/{n}", 1) for n in range(2000)],
        [choose(wordings, 0, f"r/{n}", 2) for n in range(2000)],
    ):
        assert 0.05 < sum(a == b for a, b in zip(base, changed, strict=True)) / 2000 < 0.16


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("The Lady.", "the lady"),
        ("  left   CUP \n", "left cup"),
        ("no. 5", "no. 5"),
        ("man in a U.S. shirt", "man in a u.s. shirt"),
        ("dog ..", "dog"),
        ("which one?", "which one?"),
        (".", ""),
        ("", ""),
    ],
)
def test_phrases_are_lower_case_without_a_final_full_stop(text, phrase):
    assert clean_phrase(text) == phrase


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_a_clean_phrase_stays_as_it_is_and_goes_into_a_template_whatever_it_holds(text):
    phrase = clean_phrase(text)
    assert clean_phrase(phrase) == phrase
    assert fill("Segment {} now.", phrase) == "Segment " + phrase + " now."


@pytest.mark.parametrize(
    "token", ["[SEG]", "<d_start>", "<d_end>", "<d_17>", "<|im_end|>", "<img>", "</img>", "<image>"]
)
def test_control_tokens_are_found(token):
    assert has_control_token(f"a {token} b") and not has_control_token("a <d_x> [seg] b")
