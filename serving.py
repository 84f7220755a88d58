"""The chat endpoint of `transformers serve` for one Perceptio, with masks and depth beside the answer.

The library's server knows the models of its own lists alone.  Its handler is used as it is; what is ours: the model is
one that was loaded before, `generate` becomes `perceive`, and pictures come by our rules.
"""

import base64
import json
import uuid
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response
from PIL import Image
from torch import Tensor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from perceptio.generation_perceptio import PerceptionGrammar
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor, load_picture


@dataclass(frozen=True)
class Served:
    """A model and what is served of it under one name."""

    model: PerceptioForConditionalGeneration
    processor: PerceptioProcessor
    name: str
    allow_urls: bool = False


def build_app(served: Served) -> FastAPI:
    """The server: chat completions, and what clients ask first (models, health)."""
    app, generation = FastAPI(title="perceptio"), GenerationState()

    @app.post("/v1/chat/completions")
    async def chat(body: dict):
        return await PerceptioChat(served, generation).handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": served.name, "object": "model", "created": 0, "owned_by": ""}]}

    @app.post("/load_model")  # what `transformers chat` asks first
    def load_model(_body: dict):
        event = {"status": "ready", "model": served.name, "cached": True}
        return Response(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")

    @app.get("/health")
    def health():
        return {"status": "ok"}

    @app.exception_handler(ValueError)
    async def wrong_request(_request, error: ValueError):
        return _refusal(str(error), 400)

    @app.exception_handler(HTTPException)
    async def refused(_request, error: HTTPException):
        return _refusal(str(error.detail), error.status_code)

    return app


def _refusal(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


class PerceptioChat(ChatCompletionHandler):
    """The library's handler, for one request.  The message, or the last piece of a stream, brings `perception`."""

    def __init__(self, served: Served, generation: GenerationState):
        super().__init__(SimpleNamespace(get_model_modality=lambda *_, **__: Modality.VLM), generation)
        self.served = served
        self.seen: dict | None = None

    async def handle_request(self, body: dict, request_id: str):
        for name in ("chat_template_kwargs", "logit_bias"):
            if not isinstance(body.get(name) or {}, dict):
                raise ValueError(f"`{name}` is {body[name]!r:.80}, expected an object")
        asked = dict(body.get("chat_template_kwargs") or {})
        if "perception" in body:
            asked["perception"] = body.pop("perception")
        if unknown := sorted(set(asked) - {"perception"}):
            raise ValueError(f"`chat_template_kwargs` has {unknown[0]!r}, expected `perception` or nothing")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise ValueError(f"`messages` is {body.get('messages')!r:.80}, expected a list of at least one message")
        body["chat_template_kwargs"] = asked
        if body.get("max_completion_tokens") is not None:  # transformers 5.17 knows the old name alone
            body["max_tokens"] = body.pop("max_completion_tokens")
        if body.get("logit_bias"):
            body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
        return await super().handle_request(body, request_id)

    def _resolve_model(self, body: dict):
        if body.get("model") not in (None, self.served.name):
            raise HTTPException(
                404, f"`model` is {body['model']!r:.80}, expected {self.served.name!r}: nothing else is served"
            )
        return self.served.name, self.served.model, self.served.processor

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Modality) -> list[dict]:
        _check_parts(messages)
        try:
            parsed = super().get_processor_inputs_from_messages(messages, modality)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`messages` are not those of a chat ({error!r}): see the OpenAI API") from error
        for message in parsed:
            message["content"] = [self._with_picture(part) for part in message["content"]]
        return parsed

    def _with_picture(self, part: dict) -> dict:
        if part["type"] != "image":
            return part
        url = part["url"]
        # Any other string would be the path of a file on the server.
        if not isinstance(url, str) or not url.lower().startswith(("data:", "http:", "https:")):
            raise ValueError(f"a picture is {url!r:.80}, expected a data: URL with the file in base64")
        if not self.served.allow_urls and not url.lower().startswith("data:"):
            raise ValueError(
                f"a picture is {url!r:.80}, which this server does not fetch: send a data: URL with the file in "
                "base64, or start it with --allow-urls"
            )
        limit = self.served.processor.max_image_pixels
        return {"type": "image", "image": load_picture(url, limit, self.served.allow_urls)}

    def _build_generation_config(self, body: dict, *args, **kwargs):
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature") or (body.get("temperature") is None and body.get("top_p") is not None):
            config.do_sample = True
        return config

    def _streaming(self, request_id, model, processor, model_id, inputs, gen_config, **kwargs):
        self._check_room(inputs, gen_config)
        return super()._streaming(request_id, Seeing(self), processor, model_id, inputs, gen_config, **kwargs)

    async def _non_streaming(self, request_id, model, processor, model_id, inputs, gen_config, **kwargs):
        self._check_room(inputs, gen_config)
        return await super()._non_streaming(
            request_id, Seeing(self), processor, model_id, inputs, gen_config, **kwargs
        )

    def _check_room(self, inputs, gen_config) -> None:
        """Before a stream begins: what goes wrong later, its client only sees end."""
        needed = PerceptionGrammar(self.served.model.config, inputs["input_ids"]).needed()
        if gen_config.max_new_tokens is not None and gen_config.max_new_tokens <= needed:
            raise ValueError(
                f"`max_tokens` is {gen_config.max_new_tokens}, expected at least {needed + 1}: the depth span takes "
                f'{needed}, and the answer comes after it; `perception` "seg" or "none" has no such span'
            )

    def _build_completion(self, *args, **kwargs) -> dict:
        completion = super()._build_completion(*args, **kwargs)
        completion["choices"][0]["message"]["perception"] = self.seen
        return completion

    def chunk_to_sse(self, chunk) -> str:
        line = super().chunk_to_sse(chunk)
        if chunk.choices[0].finish_reason is None:
            return line
        last = json.loads(line.removeprefix("data: "))
        last["choices"][0]["delta"]["perception"] = self.seen
        return f"data: {json.dumps(last)}\n\n"


def _check_parts(messages: list) -> None:
    """The library leaves out what it does not know; a question about a picture would be answered without it."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    for part in (part for content in contents if isinstance(content, list) for part in content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "image_url"):
            raise ValueError(f"a part of `messages` has the type {kind!r:.80}, expected 'text' or 'image_url'")


class Seeing:
    """The model as the library's server calls it: `generate` gives the ids, and leaves what was seen with the chat."""

    def __init__(self, chat: PerceptioChat):
        self.chat = chat

    def generate(self, streamer=None, tokenizer=None, **inputs) -> Tensor:
        served = self.chat.served
        # A stream ends with what was seen, so not before the masks are there.
        held = None if streamer is None else SimpleNamespace(put=streamer.put, end=lambda: None)
        try:
            output = served.model.perceive(streamer=held, tokenizer=served.processor.tokenizer, **inputs)
            self.chat.seen = describe(served.processor, output)
        except ValueError as error:
            if streamer is None:
                raise
            raise ValueError(json.dumps(str(error))[1:-1]) from error  # the library puts it between two quotes
        if streamer is not None:
            streamer.end()
        return output.sequences


def describe(processor, output) -> dict:
    """What `perceive` saw of one picture as JSON, under the pipeline's names; pictures are PNG in `data:` URLs.

    masks: of mode 1 in the picture's size, None where the thing is not there; depth: of 16 bits, 65535 is the nearest.
    """
    span, depth = processor.parse(output)[0], processor.post_process_depth(output)[0]
    masks = [
        {
            "mask": None if mask.mask is None else _png(Image.fromarray(mask.mask.cpu().numpy())),
            "score": mask.score,
            "object_score": mask.object_score,
            "area": mask.area,
        }
        for mask in processor.post_process_masks(output)[0]
    ]
    levels = None if depth is None else (depth * 65535).round().cpu().numpy().astype("uint16")
    return {
        "masks": masks,
        "depth": None if levels is None else _png(Image.fromarray(levels)),
        "depth_codes": span.depth_codes,
        "problems": span.problems,
    }


def _png(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
