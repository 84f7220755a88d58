"""The perception grammar: which tokens may follow, and what a finished sequence says.  Works on ids alone.

A turn opens with `[SEG]`, `<d_start>`, both, or neither; the *prompt* writes this opening, so it costs no step.
After `<d_start>` come exactly N codes and `<d_end>`, then the answer, in which further `[SEG]` may stand if the turn
opened with one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class DepthSpanError(ValueError):
    """A sequence whose perception part is not well formed.  Only ungrammared generation can write one."""


@dataclass
class PerceptionSpan:
    """What one sequence says.  Columns count from the start of the ids that were parsed.

    seg_positions: columns of the `[SEG]` of this turn, in order.
    seg_offsets: for each, the number of answer ids before it: its place in the text.
    depth_start: column of `<d_start>`, or None.
    depth_codes: the N codes (0 … K-1), or None unless the span is whole.
    answer_ids: what is left, without control tokens.
    problems: one sentence per fault; empty for a well-formed sequence.
    answer: the decoded answer, filled in by the processor.
    """

    seg_positions: list[int] = field(default_factory=list)
    seg_offsets: list[int] = field(default_factory=list)
    depth_start: int | None = None
    depth_codes: list[int] | None = None
    answer_ids: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    answer: str | None = None

    @property
    def valid(self) -> bool:
        return not self.problems

    def raise_if_invalid(self) -> "PerceptionSpan":
        if self.problems:
            raise DepthSpanError("; ".join(self.problems) + ": decode with the grammar (the default of `generate`)")
        return self


def opened_by(prompt_ids: list[int], config) -> tuple[bool, bool, int]:
    """How a prompt opens the turn, by its last two ids: (with `[SEG]`, with a depth span, ids of the opening)."""
    tail = [int(i) for i in prompt_ids[-2:]]
    depth = bool(tail) and tail[-1] == config.depth_start_token_id
    before = tail[:-1] if depth else tail
    seg = bool(before) and before[-1] == config.seg_token_id
    return seg, depth, int(seg) + int(depth)


def parse_span(ids: list[int], config, start: int = 0, skip: tuple[int, ...] = ()) -> PerceptionSpan:
    """Read a turn from column `start` on.  Nothing is padded, cut or repeated to fit: what is wrong is said.

    `skip` are ids which are neither answer nor fault (padding, end of turn).
    """
    span = PerceptionSpan()
    first, count = config.depth_code_token_ids
    n, column, stray = config.span_length, start, 0
    while column < len(ids):
        token = int(ids[column])
        if token == config.seg_token_id:
            span.seg_positions.append(column)
            span.seg_offsets.append(len(span.answer_ids))
        elif token == config.depth_start_token_id:
            codes = []
            while column + 1 < len(ids) and first <= int(ids[column + 1]) < first + count:
                column += 1
                codes.append(int(ids[column]) - first)
            closed = column + 1 < len(ids) and int(ids[column + 1]) == config.depth_end_token_id
            _take_span(span, codes, closed, n, column - len(codes))
            column += closed
        elif token == config.depth_end_token_id or first <= token < first + count:
            stray += 1
        elif token not in skip:
            span.answer_ids.append(token)
        column += 1
    if stray:
        span.problems.append(f"{stray} depth tokens stand outside a span")
    return span


def _take_span(span: PerceptionSpan, codes: list[int], closed: bool, expected: int, column: int) -> None:
    if span.depth_start is not None:
        span.problems.append(f"a second depth span opens at column {column}, expected one")
        return
    span.depth_start = column
    if span.answer_ids:
        span.problems.append(f"the depth span opens at column {column}, after the answer began")
    if len(codes) != expected:
        span.problems.append(f"the depth span has {len(codes)} codes, expected {expected}")
    if not closed:
        span.problems.append("the depth span has no end marker")
    if len(codes) == expected and closed:
        span.depth_codes = codes


class PerceptionGrammar(LogitsProcessor):
    """Forbids every token that cannot follow.

    What may follow depends on the prompt and the number of tokens since, so beams, assisted decoding and batches that
    mix modes need nothing special.

    prompt_ids: int[B, L]; rows of `input_ids` that belong to one prompt (beams, several returned sequences) are
    neighbours, as `generate` lays them out.
    max_length: the column at which generation ends; a `[SEG]` there would have no state to read, so none is written.
    """

    def __init__(self, config, prompt_ids: Tensor, max_length: int | None = None):
        self.max_length = max_length
        self.seg, self.end = config.seg_token_id, config.depth_end_token_id
        self.codes = slice(config.depth_code_token_ids[0], sum(config.depth_code_token_ids))
        self.length, self.prompt_length = config.span_length, prompt_ids.shape[1]
        window = prompt_ids[:, -(self.length + 2) :].tolist()
        self.opened = [self._opening(row, config) for row in window]
        outside = [config.depth_start_token_id, self.end, *range(self.codes.start, self.codes.stop)]
        outside += [config.image_token_id, *(config.blocked_token_ids or [])]
        self.outside = torch.tensor(sorted(set(outside)), device=prompt_ids.device)
        self.outside_and_seg = torch.tensor(sorted({*outside, self.seg}), device=prompt_ids.device)

    def _opening(self, ids: list[int], config) -> tuple[bool, int | None]:
        """(whether `[SEG]` opens the turn, codes that the prompt's open span already holds or None)."""
        held = 0
        while held < min(len(ids), self.length) and self.codes.start <= ids[-1 - held] < self.codes.stop:
            held += 1
        seg, depth, _ = opened_by(ids[: len(ids) - held], config)
        if held and not depth:  # codes without a start marker: no span that could be closed
            return False, None
        return seg, held if depth else None

    def needed(self) -> int:
        """New tokens without which a span that the prompt opened could not be closed."""
        return max((self.length + 1 - held for _, held in self.opened if held is not None), default=0)

    def states(self, input_ids: Tensor) -> dict[str, list[int]]:
        """Rows of `input_ids` by what may follow: "code", "end" (its marker), "text", or "seg" (text or `[SEG]`)."""
        written, copies = input_ids.shape[1] - self.prompt_length, max(input_ids.shape[0] // len(self.opened), 1)
        last = self.max_length is not None and input_ids.shape[1] + 1 >= self.max_length
        rows: dict[str, list[int]] = {}
        for row in range(input_ids.shape[0]):
            seg, held = self.opened[min(row // copies, len(self.opened) - 1)]
            missing = -1 if held is None else self.length - held - written
            state = "code" if missing > 0 else "end" if missing == 0 else "seg" if seg and not last else "text"
            rows.setdefault(state, []).append(row)
        return rows

    def legal(self, state: str) -> slice | None:
        """The ids that may follow inside a span; None outside one."""
        return {"code": self.codes, "end": slice(self.end, self.end + 1)}.get(state)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.sum()):
            self._check_numbers(input_ids, scores)
        states = self.states(input_ids)
        if len(states) == 1:
            return self._restrict(next(iter(states)), input_ids, scores)
        restricted = torch.empty_like(scores)
        for state, rows in states.items():
            restricted[rows] = self._restrict(state, input_ids[rows], scores[rows])
        return restricted

    def _restrict(self, state: str, input_ids: Tensor, scores: Tensor) -> Tensor:
        legal = self.legal(state)
        if state == "text":
            return scores.index_fill(1, self.outside_and_seg, -torch.inf)
        if state == "seg":  # two in a row would ask for one thing twice, and a weak model never stops asking
            restricted = scores.index_fill(1, self.outside, -torch.inf)
            restricted[:, self.seg].masked_fill_(input_ids[:, -1] == self.seg, -torch.inf)
            return restricted
        restricted = torch.full_like(scores, -torch.inf)
        restricted[:, legal] = scores[:, legal]
        return restricted

    def _check_numbers(self, input_ids: Tensor, scores: Tensor) -> None:
        bad = torch.isnan(scores).any(-1)
        if bad.any():
            raise FloatingPointError(
                f"the model's scores are NaN at generated token {input_ids.shape[1] - self.prompt_length} of row "
                f"{int(bad.nonzero()[0])}: load in bfloat16 or float32 instead of float16, or check the weights"
            )


class GrammarAlone(LogitsProcessorList):
    """A list with nothing but the grammar.  The library's own looks up the signature of each member at every token."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return self[0](input_ids, scores)


class SpanGuard(LogitsProcessor):
    """Runs after every other processor.  A penalty or a filter may leave no legal token inside a span (eight codes and
    a ban on repeated n-grams, say); there the grammar wins, and its legal ids get equal scores."""

    def __init__(self, grammar: PerceptionGrammar):
        self.grammar = grammar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for state, rows in self.grammar.states(input_ids).items():
            legal = self.grammar.legal(state)
            if legal is not None:
                kept = scores[rows, legal]
                empty = (kept == -torch.inf).all(-1, keepdim=True)
                scores[rows, legal] = kept.masked_fill(empty, 0.0)
        return scores


__all__ = [
    "DepthSpanError",
    "GrammarAlone",
    "PerceptionGrammar",
    "PerceptionSpan",
    "SpanGuard",
    "opened_by",
    "parse_span",
]
