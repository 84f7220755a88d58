"""`pipeline("perceptio")`: pictures and questions in; answers, masks and depth maps out."""

from collections.abc import Iterator, Sequence
from itertools import repeat

from PIL import Image
from torch.utils.data import Dataset
from transformers import Pipeline

from .generation_perceptio import PerceptionSpan
from .processing_perceptio import load_picture


class PerceptioPipeline(Pipeline):
    """Answers questions about pictures and shows what the answer rests on.

    Inputs: `(image=…, text=…)`, a dict with these keys, a chat (list of messages), or a list or generator of either.
    `image` and `text` may be many, too: lists give a list; a generator, a data set (`KeyDataset`) or a column of one
    is read as it is needed.  A picture is whatever `load_picture` takes; addresses only with `allow_urls=True`.

    Result per input, every key always present and None for what was not asked for:
        generated_text: the answer alone.
        mask: PIL picture, mode L, 0 or 255, in the input's size; None also where the thing is not there.
        score, object_score: SAM2's predicted IoU of that mask, and the probability that the thing is there.
        masks: list of dicts (mask, score, object_score, position, area in pixels), one per `[SEG]`, the above first.
        predicted_depth: float32[H, W], relative inverse depth in [0, 1], larger is nearer, scaled per picture.
        depth: the same as a PIL picture, mode L;  depth_codes: the N codes.
        problems: what is wrong with the generated sequence; empty under the grammar.

    perception: "seg+depth", "seg", "depth" or "none"; by default the first for one picture, and the last without.
    max_new_tokens, generate_kwargs, streamer: for `generate`.  threshold, object_threshold: for the masks.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor.check_config(self.model.config)

    def _sanitize_parameters(
        self,
        perception=None,
        allow_urls=None,
        max_new_tokens=None,
        streamer=None,
        generate_kwargs=None,
        threshold=None,
        object_threshold=None,
    ):
        preprocess = {"perception": perception, "allow_urls": allow_urls}
        forward = {"max_new_tokens": max_new_tokens, "streamer": streamer, **(generate_kwargs or {})}
        postprocess = {"threshold": threshold, "object_threshold": object_threshold}
        given = [{name: v for name, v in part.items() if v is not None} for part in (preprocess, forward, postprocess)]
        given[1].update({f"post_{name}": value for name, value in given.pop().items()})
        return given[0], given[1], {}

    def __call__(self, inputs=None, *, image=None, text=None, **kwargs):
        if text is not None:
            pictures = inputs if image is None else image
            inputs = self._pairs(pictures, text)
        elif image is not None:
            raise ValueError("`text` is missing: a picture needs a question")
        elif inputs is None:
            raise ValueError("nothing was asked: pass image=… and text=…, a dict of both, or chat messages")
        return super().__call__(inputs, **kwargs)

    @staticmethod
    def _pairs(pictures, text):
        given = (pictures, text)
        streams = any(map(_is_stream, given))
        many = [_is_stream(values) or isinstance(values, (list, tuple)) for values in given]
        if not any(many):
            return {"image": pictures, "text": text}
        if not streams and all(many) and len(text) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures and {len(text)} texts: pass as many of each, or one text")
        columns = [values if several else repeat(values) for values, several in zip(given, many, strict=True)]
        pairs = ({"image": picture, "text": words} for picture, words in zip(*columns, strict=all(many)))
        return pairs if streams else list(pairs)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Lazy, in batches that the processor pads: the library's own collation knows no ragged pictures."""

        def answers():
            batch = []
            for index, item in enumerate(inputs):
                try:
                    batch.append(self.preprocess(item, **preprocess_params))
                except (ValueError, TypeError, OSError) as error:
                    raise type(error)(f"input {index}: {error}") from error
                if len(batch) == batch_size:
                    yield from self._answer(batch, forward_params, postprocess_params)
                    batch = []
            yield from self._answer(batch, forward_params, postprocess_params)

        return answers()

    def _answer(self, batch: list[dict], forward_params: dict, postprocess_params: dict):
        if batch:
            joined = {key: [item[key][0] for item in batch] for key in batch[0]}
            outputs = self.forward(joined, **forward_params)
            for row in range(len(batch)):
                yield self.postprocess(
                    {key: values[row : row + 1] for key, values in outputs.items()}, **postprocess_params
                )

    def preprocess(self, inputs, perception=None, allow_urls: bool = False) -> dict:
        messages = getattr(inputs, "messages", inputs)
        if isinstance(messages, dict):
            messages = self._one_question(messages)
        if not isinstance(messages, (list, tuple)):
            raise TypeError(
                f"an input is a {type(messages).__name__}, expected a dict with `image` and `text`, or chat messages"
            )
        return {"chats": [[self._with_pictures(m, allow_urls) for m in messages]], "modes": [perception]}

    @staticmethod
    def _one_question(inputs: dict) -> list[dict]:
        unknown = sorted(set(inputs) - {"image", "text"})
        if unknown or not isinstance(inputs.get("text"), str):
            raise ValueError(
                f"an input has the keys {sorted(inputs)}, expected `text` (a string) and, for a question about a "
                "picture, `image`"
            )
        parts = [] if inputs.get("image") is None else [{"type": "image", "image": inputs["image"]}]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": inputs["text"]}]}]

    def _with_pictures(self, message, allow_urls: bool):
        """The message with its pictures loaded by our rules: the library's loader fetches whatever it is told."""
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, (list, tuple)):
            return message
        parts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "image":
                keys = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
                if len(keys) != 1:
                    raise ValueError(
                        f"a picture part has the keys {sorted(part)}, expected one of image, path, url, base64"
                    )
                picture = load_picture(part[keys[0]], self.processor.max_image_pixels, allow_urls)
                part = {"type": "image", "image": picture}
            parts.append(part)
        return {**message, "content": parts}

    def _forward(self, model_inputs: dict, post_threshold: float = 0.5, post_object_threshold: float = 0.5, **kwargs):
        inputs = self.processor.apply_chat_template(
            model_inputs["chats"],
            perception=model_inputs["modes"],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.device)
        output = self.model.perceive(**inputs, **kwargs)
        masks = self.processor.post_process_masks(
            output, threshold=post_threshold, object_threshold=post_object_threshold
        )
        return {
            "span": self.processor.parse(output.sequences, prompt_length=output.prompt_length),
            "masks": masks,
            "depth": self.processor.post_process_depth(output),
        }

    def postprocess(self, model_outputs: dict) -> dict:
        span: PerceptionSpan = model_outputs["span"][0]
        depth = model_outputs["depth"][0]
        masks = [self._mask_result(mask) for mask in model_outputs["masks"][0]]
        first = masks[0] if masks else {}
        return {
            "generated_text": span.answer,
            "mask": first.get("mask"),
            "score": first.get("score"),
            "object_score": first.get("object_score"),
            "masks": masks or None,
            "predicted_depth": depth,
            "depth": None if depth is None else Image.fromarray((depth * 255).round().byte().cpu().numpy()),
            "depth_codes": span.depth_codes,
            "problems": span.problems,
        }

    @staticmethod
    def _mask_result(mask) -> dict:
        picture = None if mask.mask is None else Image.fromarray((mask.mask.byte() * 255).cpu().numpy())
        return {
            "mask": picture,
            "score": mask.score,
            "object_score": mask.object_score,
            "position": mask.position,
            "area": mask.area,
        }


def _is_stream(values) -> bool:
    """Many inputs that are not to be held all at once."""
    if isinstance(values, (str, bytes, bytearray, memoryview, list, tuple)):
        return False
    return isinstance(values, (Dataset, Iterator, Sequence))


__all__ = ["PerceptioPipeline"]
