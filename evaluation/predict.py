"""Items → predictions, by the pipeline; also with depth codes that the model did not choose."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..data.depths import DepthError, decode_depth
from ..data.label import encode_codes
from ..data.masks import encode_mask
from ..pipeline_perceptio import PerceptioPipeline
from ..processing_perceptio import PictureError, load_picture
from . import CODES
from .benchmark import Item, Prediction

DIGITS = 6  # of a score: what lies behind depends on the size of the batch


@dataclass(frozen=True)
class Task:
    """One item as it is asked.  other: a picture that is not the item's, where codes are to be taken from one."""

    item: Item
    perception: str
    other: bytes | None = None


class ForcedCodes(LogitsProcessor):
    """Writes given codes into the depth span that the prompt has opened; the end marker and the answer follow as ever.

    ids: int[B, N], the token ids of the codes, a row for each prompt.
    """

    def __init__(self, ids: Tensor):
        self.ids, self.prompt_length = ids, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        written = input_ids.shape[1] - self.prompt_length
        if written >= self.ids.shape[1]:
            return scores
        return torch.full_like(scores, -torch.inf).scatter_(1, self.ids[:, written : written + 1], 0.0)


class Predictor:
    """Greedy, so that the same item gives the same prediction.

    answer_tokens: room for the answer, after the span.  max_new_tokens: room for both, in its place.
    depth_codes: whose codes stand in the span: the model's "own"; "random" ones, which follow from the item's id;
        "constant", the middle code everywhere; those that the model writes for an "other" picture; or "oracle", those
        of the true depth.
    """

    def __init__(
        self,
        pipe: PerceptioPipeline,
        answer_tokens: int = 64,
        max_new_tokens: int | None = None,
        depth_codes: str = "own",
    ):
        if depth_codes not in CODES:
            raise ValueError(f"`depth_codes` is {depth_codes!r}, expected one of {', '.join(CODES)}")
        self.pipe, self.depth_codes = pipe, depth_codes
        self.answer_tokens, self.max_new_tokens = answer_tokens, max_new_tokens
        self.config = pipe.model.config

    def decode(self, codes: list[int]) -> np.ndarray:
        """The codes of one span → float32[h, w]."""
        with torch.no_grad():
            return self.pipe.model.decode_depth(torch.tensor([codes]))[0].float().cpu().numpy()

    def __call__(self, tasks: Sequence[Task]) -> list[Prediction]:
        """One for each task, in their order.  All tasks have one perception."""
        modes = {task.perception for task in tasks}
        if len(modes) != 1:
            raise ValueError(f"a batch asks for {', '.join(sorted(modes))}, expected one perception: split it")
        mode = modes.pop()
        ready, found = [], {}
        for index, task in enumerate(tasks):
            found[index] = Prediction(task.item.id, mode, decode=self.decode)
            try:
                pictures = [self._load(data) for data in task.item.pictures]
                other = None if task.other is None else self._load(task.other)
                codes = self._codes(task) if "depth" in mode else None
                ready.append((index, _chat(pictures, task.item.question), other, codes))
            except PictureError as error:
                found[index].error = f"damaged picture: {' '.join(str(error).split())}"
            except DepthError as error:
                found[index].error = f"unusable depth: {' '.join(str(error).split())}"
        if ready:
            indices, chats, others, codes = zip(*ready, strict=True)
            if self.depth_codes == "other" and "depth" in mode:
                codes = self._codes_of(others, [tasks[index].item.question for index in indices])
            span = self.config.span_length + 1 if "depth" in mode else 0
            results = self._ask(chats, mode, codes, self.max_new_tokens or span + self.answer_tokens)
            for index, result, forced in zip(indices, results, codes, strict=True):
                self._fill(found[index], result)
                if forced is not None and result["depth_codes"] != forced:
                    raise RuntimeError(f"the codes of {tasks[index].item.id!r} were not written as given")
        return [found[index] for index in range(len(tasks))]

    def _load(self, data: bytes):
        return load_picture(data, self.pipe.processor.max_image_pixels)

    def _ask(self, chats, mode: str, codes, max_new_tokens: int) -> list[dict]:
        kwargs = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        if codes[0] is not None:
            ids = torch.tensor(codes, device=self.pipe.device) + self.config.depth_code_token_ids[0]
            kwargs["logits_processor"] = LogitsProcessorList([ForcedCodes(ids)])
        return self.pipe(
            list(chats), perception=mode, batch_size=len(chats), object_threshold=0.0, generate_kwargs=kwargs
        )

    def _codes(self, task: Task) -> list[int] | None:
        """What is to be written, as far as it follows from the item alone."""
        count, n = self.config.depth_code_token_ids[1], self.config.span_length
        if self.depth_codes == "random":
            seed = int.from_bytes(hashlib.sha256(task.item.id.encode()).digest()[:8], "big")
            return np.random.default_rng(seed).integers(count, size=n).tolist()
        if self.depth_codes == "constant":
            return [count // 2] * n
        if self.depth_codes == "oracle":
            if task.item.depth is None:
                raise ValueError(f"{task.item.id!r} has no true depth, so that it has no oracle: choose other codes")
            return encode_codes(decode_depth(task.item.depth), self.pipe.model.depth_model)
        return None

    def _codes_of(self, pictures, questions) -> list[list[int]]:
        """What the model writes for other pictures, asked the same."""
        chats = [_chat([picture], question) for picture, question in zip(pictures, questions, strict=True)]
        room = self.config.span_length + 1
        return [result["depth_codes"] for result in self._ask(chats, "depth", [None] * len(chats), room)]

    @staticmethod
    def _fill(prediction: Prediction, result: dict) -> None:
        prediction.answer = result["generated_text"]
        prediction.depth_codes, prediction.problems = result["depth_codes"], list(result["problems"])
        for mask in result["masks"] or []:
            scores = {name: round(mask[name], DIGITS) for name in ("score", "object_score")}
            prediction.masks.append({**encode_mask(np.asarray(mask["mask"]) > 0), **scores})


def _chat(pictures, question: str) -> list[dict]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
