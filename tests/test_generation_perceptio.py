"""The grammar, and its inverse, the parser."""

import pytest
import torch

from perceptio.generation_perceptio import DepthSpanError, PerceptionGrammar, SpanGuard, opened_by, parse_span
from perceptio.hub.tiny import tiny_config

CONFIG = tiny_config()
SEG, START, END = CONFIG.seg_token_id, CONFIG.depth_start_token_id, CONFIG.depth_end_token_id
FIRST, COUNT = CONFIG.depth_code_token_ids
N, VOCAB = CONFIG.span_length, CONFIG.text_config.vocab_size
CODES = [FIRST + i % COUNT for i in range(N)]
TEXT = [10, 11, 12]


def legal(prompt: list[int], written: list[int]) -> set[int]:
    grammar = PerceptionGrammar(CONFIG, torch.tensor([prompt]))
    scores = grammar(torch.tensor([prompt + written]), torch.zeros(1, VOCAB))
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("tail", "expected"),
    [([SEG, START], (True, True, 2)), ([SEG], (True, False, 1)), ([START], (False, True, 1)), ([], (False, False, 0))],
)
def test_a_prompt_is_read_from_its_last_two_ids(tail, expected):
    assert opened_by([SEG, START, *CODES, END, *TEXT, *tail], CONFIG) == expected


def test_inside_a_span_only_codes_then_only_the_end_marker():
    for written in range(N):
        assert legal([5, SEG, START], CODES[:written]) == set(range(FIRST, FIRST + COUNT))
    assert legal([5, SEG, START], CODES) == {END}


def test_outside_a_span_no_depth_token_and_no_picture_token():
    allowed = legal([5, SEG, START], [*CODES, END])
    assert allowed == set(range(VOCAB)) - {START, END, CONFIG.image_token_id, *range(FIRST, FIRST + COUNT)}
    assert legal([5], []) == legal([5, START], [*CODES, END]) == allowed - {SEG}


def test_seg_never_follows_seg_directly_nor_stands_last():
    """A weak model repeats [SEG] without end (LISA #103); the state of a last one is never computed."""
    assert SEG not in legal([5, SEG], [])
    assert SEG in legal([5, SEG], TEXT)
    grammar = PerceptionGrammar(CONFIG, torch.tensor([[5, SEG]]), max_length=4)
    assert not torch.isfinite(grammar(torch.tensor([[5, SEG, 10]]), torch.zeros(1, VOCAB))[0, SEG])


def test_blocked_ids_are_never_written():
    config = tiny_config(blocked_token_ids=[7])
    scores = PerceptionGrammar(config, torch.tensor([[5]]))(torch.tensor([[5]]), torch.zeros(1, VOCAB))
    assert not torch.isfinite(scores[0, 7])


def test_a_batch_mixes_modes_and_beams():
    prompts = torch.tensor([[5, SEG, START], [5, 5, SEG], [5, 5, START], [5, 5, 5]])
    grammar = PerceptionGrammar(CONFIG, prompts)
    both = grammar(prompts.repeat_interleave(2, 0), torch.zeros(8, VOCAB))
    for row, prompt in enumerate(prompts.tolist()):
        alone = legal(prompt, [])
        for copy in (2 * row, 2 * row + 1):
            assert set(torch.isfinite(both[copy]).nonzero()[:, 0].tolist()) == alone


def test_a_prompt_that_ends_inside_a_span_is_continued():
    """Assisted decoding hands the sequence so far to the assistant as its prompt."""
    assert legal([SEG, START, *CODES[:4]], CODES[4:]) == {END}
    assert PerceptionGrammar(CONFIG, torch.tensor([[SEG, START, *CODES[:4]]])).needed() == N + 1 - 4


def test_the_grammar_returns_legal_scores_unchanged_and_leaves_its_input_alone():
    scores = torch.randn(1, VOCAB)
    before = scores.clone()
    after = PerceptionGrammar(CONFIG, torch.tensor([[5, START]]))(torch.tensor([[5, START]]), scores)
    assert torch.equal(scores, before)
    assert torch.equal(after[0, FIRST : FIRST + COUNT], before[0, FIRST : FIRST + COUNT])


def test_the_guard_restores_a_span_that_a_penalty_emptied():
    grammar = PerceptionGrammar(CONFIG, torch.tensor([[5, START], [5, 5]]))
    scores = torch.full((2, VOCAB), -torch.inf)
    guarded = SpanGuard(grammar)(torch.tensor([[5, START], [5, 5]]), scores)
    assert torch.isfinite(guarded[0]).nonzero()[:, 0].tolist() == list(range(FIRST, FIRST + COUNT))
    assert not torch.isfinite(guarded[1]).any()


def test_nan_scores_name_the_step():
    grammar = PerceptionGrammar(CONFIG, torch.tensor([[5, SEG]]))
    with pytest.raises(FloatingPointError, match="generated token 2 of row 0"):
        grammar(torch.tensor([[5, SEG, 10, 11]]), torch.full((1, VOCAB), torch.nan))


def test_infinite_scores_are_no_error():
    scores = torch.zeros(1, VOCAB)
    scores[0, 3], scores[0, 4] = -torch.inf, torch.inf
    assert torch.isfinite(PerceptionGrammar(CONFIG, torch.tensor([[5]]))(torch.tensor([[5]]), scores)[0, 10])


# Parsing


def test_parse_inverts_the_format():
    ids = [5, 6, SEG, START, *CODES, END, 10, 11, SEG, 12, 2]
    span = parse_span(ids, CONFIG, start=2, skip=(2,))
    assert span.valid and span.raise_if_invalid() is span
    assert span.depth_codes == [code - FIRST for code in CODES] and span.depth_start == 3
    assert span.answer_ids == [10, 11, 12]
    assert span.seg_positions == [2, 4 + N + 3] and span.seg_offsets == [0, 2]


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([SEG, START, *CODES[:-1], END, 10], f"has {N - 1} codes, expected {N}"),
        ([SEG, START, *CODES, FIRST, END, 10], f"has {N + 1} codes, expected {N}"),
        ([SEG, START, *CODES], "has no end marker"),
        ([SEG, START, *CODES[:2]], "has no end marker"),
        ([START, *CODES, END, START, *CODES, END], "second depth span"),
        ([10, START, *CODES, END], "after the answer began"),
        ([END, 10], "1 depth tokens stand outside a span"),
        ([FIRST, FIRST, 10], "2 depth tokens stand outside a span"),
    ],
)
def test_every_fault_is_named_and_nothing_is_repaired(ids, problem):
    span = parse_span(ids, CONFIG)
    assert not span.valid and problem in "; ".join(span.problems)
    with pytest.raises(DepthSpanError, match="grammar"):
        span.raise_if_invalid()


@pytest.mark.parametrize("codes", [CODES[:-1], [*CODES, FIRST], []])
def test_a_span_of_the_wrong_length_gives_no_codes(codes):
    """98 codes where 100 are due (MolmoAct #15) are not padded."""
    assert parse_span([START, *codes, END], CONFIG).depth_codes is None


def test_an_answer_alone_is_valid():
    span = parse_span(TEXT, CONFIG)
    assert span.valid and span.answer_ids == TEXT and span.depth_codes is None and span.seg_positions == []
