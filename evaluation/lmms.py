"""Perceptio as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`:

    lmms-eval --model perceptio --model_args pretrained=perceptio-8b --tasks blink_relative_depth,mme --batch_size 8

model_args: pretrained (folder or Hub id), perception (default seg+depth: what stands before the answer, in a chat with
exactly one picture), dtype (auto).  lmms-eval's own options give `device` and `batch_size`.
"""

import os
from itertools import groupby

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..cli import MODES, choose_device

ANSWER_TOKENS = 1024  # where a task sets no `max_new_tokens`


def manifest():
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("perceptio", chat_class_path=f"{__name__}.Perceptio")


class Perceptio(lmms):
    """Answers the chats of a task, in batches of one mode and one set of generation arguments.

    A task's `max_new_tokens` is the room for the answer: a depth span has its own.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        perception: str = "seg+depth",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        from transformers import pipeline

        from .. import PerceptioForConditionalGeneration, PerceptioPipeline, PerceptioProcessor

        if perception not in MODES:
            raise ValueError(f"`perception` is {perception!r}, expected one of {', '.join(MODES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is {batch_size!r}, expected 1 or more")
        self.perception, self.batch_size = perception, int(batch_size)
        self.pipe = pipeline(
            "perceptio",
            model=PerceptioForConditionalGeneration.from_pretrained(pretrained, dtype=dtype),
            processor=PerceptioProcessor.from_pretrained(pretrained),
            pipeline_class=PerceptioPipeline,
            device=_device(device),
        )

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers alone, in the order of the requests."""
        chats = [self._chat(request) for request in requests]
        modes = [self.perception if _pictures(chat) == 1 else "none" for chat in chats]
        wanted = [(mode, sorted(request.args[2].items())) for mode, request in zip(modes, requests, strict=True)]
        order = sorted(range(len(requests)), key=lambda index: repr(wanted[index]))
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), unit=" answers", disable=self.rank != 0) as bar:
            for _, group in groupby(order, key=lambda index: repr(wanted[index])):
                group = list(group)
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    asked = requests[batch[0]].args[2]
                    texts = self._ask([chats[index] for index in batch], modes[batch[0]], asked)
                    answers.update(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answers[index])
        return [answers[index] for index in range(len(requests))]

    def _chat(self, request: Instance) -> list[dict]:
        _, to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        _, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise ValueError(f"{task} shows a video or a sound, expected pictures and text: choose another task")
        return messages.to_hf_messages()

    def _ask(self, chats: list[list[dict]], mode: str, asked: dict) -> list[str]:
        span = self.pipe.model.config.span_length + 1 if "depth" in mode else 0
        kwargs = {
            "max_new_tokens": span + int(asked.get("max_new_tokens", ANSWER_TOKENS)),
            "num_beams": asked.get("num_beams") or 1,
            "do_sample": bool(asked.get("temperature")),
        }
        if kwargs["do_sample"]:
            kwargs |= {name: asked[name] for name in ("temperature", "top_p", "top_k") if asked.get(name) is not None}
        results = self.pipe(chats, perception=mode, batch_size=len(chats), generate_kwargs=kwargs)
        return [_cut(result["generated_text"], asked.get("until")) for result in results]

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("perceptio gives answers, not likelihoods: choose a task of the type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("perceptio answers one round: choose a task of the type generate_until")


def _device(name: str | None) -> torch.device:
    """One CUDA device for each process, where there are several."""
    device = choose_device(name or "auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if str(device) == "cuda" else device


def _pictures(chat: list[dict]) -> int:
    return sum(part["type"] == "image" for message in chat for part in message["content"])


def _cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the strings."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text
