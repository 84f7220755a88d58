"""One question on the page, from the first token to the pipeline's result, as states that the viewer draws.

Knows nothing of gradio.  A state is plain JSON; each says everything, so that none depends on one before it.
"""

import base64
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from queue import Empty, Queue
from threading import Event

import numpy as np
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from ..cli import MODES
from ..drawing import MASK_COLOURS, colour_depth, lay_mask_over
from ..processing_perceptio import PICTURE_FORMATS, PictureError, load_picture

SHOWN_SIDE, READ_SIDE = 1024, 320  # pixels of the longer side: of the pictures, and of the depth that can be read
MOST_BYTES, LONGEST_QUESTION = 20 * 2**20, 500
PAUSE = 0.04  # seconds that tokens are gathered: drawn one by one, those of a fast model keep a browser busy
BROKEN = "Something went wrong here, and not with your picture. Please try again, or try another question."
ANIMATED = ("GIF", "PNG", "WEBP")  # a JPEG may hold previews, a TIFF pages: their first picture is the picture
SEEN = {"seg+depth": "mask and depth", "seg": "a mask", "depth": "depth", "none": "words alone"}


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class TokenStream(BaseStreamer):
    """What `generate` writes, one list of ids after another; the prompt comes first."""

    def __init__(self):
        self.queue, self.stopped = Queue(), Event()

    def put(self, value) -> None:
        if self.stopped.is_set():
            raise Stopped
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        """`generate` calls it; what follows (masks, depth) is still to come."""

    def take(self) -> list[list[int] | None]:
        """All that has come since the last call, at least one; None when the pipeline has returned."""
        taken = [self.queue.get()]
        time.sleep(PAUSE)
        while True:
            try:
                taken.append(self.queue.get_nowait())
            except Empty:
                return taken


def follow(pipe, picture: Image.Image, question: str, perception: str) -> Iterator[tuple]:
    """Runs the pipeline in a thread; yields (ids so far, length of the prompt, None), at last with its result."""
    stream = TokenStream()

    def run() -> dict:
        try:
            return pipe(image=picture, text=question, perception=perception, streamer=stream)
        finally:
            stream.queue.put(None)

    ids, prompt_length = [], None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            while True:
                chunks = stream.take()
                for chunk in filter(None, chunks):
                    ids += chunk
                    prompt_length = prompt_length or len(ids)
                yield ids, prompt_length, running.result() if chunks[-1] is None else None
                if chunks[-1] is None:
                    return
        finally:
            stream.stopped.set()


def look(pipe, upload, question: str, perception: str = "seg+depth") -> Iterator[dict]:
    """The states of one question; what is wrong with it is told in one.  upload: gradio's dict of a file, or None."""
    run = {"run": time.time()}  # when a page has asked twice, it shows the later
    try:
        picture = read_upload(upload, pipe.processor.max_image_pixels)
        question = check_question(question)
        if perception not in MODES:
            raise ValueError(f"what to see is {str(perception)!r:.40}, expected one of {', '.join(MODES)}")
    except (PictureError, ValueError) as error:
        yield run | problem(str(error))
        return
    try:
        for state in _states(pipe, picture, question, perception):
            yield run | state
    except Exception:
        logging.getLogger(__name__).exception("a question could not be answered")
        yield run | problem(BROKEN)


def problem(text: str) -> dict:
    return {"stage": "problem", "message": text[:1].upper() + text[1:]}


def read_upload(upload, max_pixels: int) -> Image.Image:
    path = upload.get("path") if isinstance(upload, dict) else None
    if not path:
        raise PictureError("there is no picture yet: drop one, or take one of the examples")
    if Path(path).stat().st_size > MOST_BYTES:
        raise PictureError(f"the picture has more than {MOST_BYTES // 2**20} MB: make it smaller")
    data = Path(path).read_bytes()
    picture = load_picture(data, max_pixels)
    with Image.open(BytesIO(data), formats=PICTURE_FORMATS) as opened:
        if opened.format in ANIMATED and getattr(opened, "is_animated", False):
            raise PictureError("the picture is animated, expected a still one: save one of its frames as PNG or JPEG")
    return picture


def check_question(question) -> str:
    question = question.strip() if isinstance(question, str) else ""
    if not question:
        raise ValueError("there is no question yet: ask something about the picture")
    if len(question) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(question)} characters, expected at most {LONGEST_QUESTION}")
    return question


def _states(pipe, picture: Image.Image, question: str, perception: str) -> Iterator[dict]:
    began, photo = time.perf_counter(), fit(picture)
    state = {
        "stage": "looking",
        "message": "Looking at the picture …",
        "question": question,
        "photo": as_url(photo),
        "opening": [token for token, part in (("[SEG]", "seg"), ("<d_start>", "depth")) if part in perception],
        "expected": pipe.processor.span_length if "depth" in perception else 0,
        "codes": [],
        "answer": "",
    }
    yield state
    for ids, prompt_length, result in follow(pipe, picture, question, perception):
        if result is None:
            state = state | progress(pipe.processor, ids, prompt_length, state["expected"])
        else:
            state = state | finished(result, photo, time.perf_counter() - began)
        yield state


def progress(processor, ids: list[int], prompt_length: int, expected: int) -> dict:
    first, count = processor.depth_code_token_ids
    codes = [token - first for token in ids[prompt_length:] if first <= token < first + count]
    span = processor.parse([ids], prompt_length=prompt_length)[0]
    if len(codes) < expected:
        return {"stage": "depth", "message": f"Depth code {len(codes)} of {expected}", "codes": codes}
    return {"stage": "answer", "message": "Answering …", "codes": codes, "answer": span.answer.rstrip("�")}


def finished(result: dict, photo: Image.Image, seconds: float) -> dict:
    depth = result["predicted_depth"]
    state = {
        "stage": "done",
        "message": f"Done in {seconds:.1f} seconds",
        "answer": result["generated_text"],
        "codes": result["depth_codes"] or [],
        "notes": [*mask_notes(result["masks"] or []), *result["problems"]],
    }
    present = [(number, mask["mask"]) for number, mask in enumerate(result["masks"] or []) if mask["mask"] is not None]
    if present:
        masked = photo
        for number, mask in present:
            masked = lay_mask_over(masked, mask, MASK_COLOURS[number % len(MASK_COLOURS)])
        state["masked"] = as_url(masked)
    if depth is not None:
        depth = depth.float().cpu()
        state["depth"] = as_url(colour_depth(depth.numpy()).resize(photo.size, Image.Resampling.BILINEAR))
        state["values"] = as_values(depth)
    return state


def mask_notes(masks: list[dict]) -> list[str]:
    notes = []
    for number, mask in enumerate(masks, start=1):
        name = "Mask" if len(masks) == 1 else f"Mask {number}"
        there = f"{mask['object_score']:.0%} sure that it is there"
        if mask["mask"] is None:
            notes.append(f"{name}: none, the thing does not seem to be in the picture ({there})")
        else:
            share = mask["area"] / (mask["mask"].width * mask["mask"].height)
            notes.append(f"{name}: {share:.0%} of the picture, {there}, predicted IoU {mask['score']:.2f}")
    return notes


def fit(picture: Image.Image) -> Image.Image:
    shown = picture.copy()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return shown


def as_url(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def as_values(depth: torch.Tensor) -> dict:
    """float[H, W] in [0, 1] → a smaller map in bytes, 255 for 1, which the page reads at a point."""
    scale = min(1.0, READ_SIDE / max(depth.shape))
    size = [max(1, round(side * scale)) for side in depth.shape]
    small = torch.nn.functional.interpolate(depth[None, None], size, mode="area")[0, 0]
    data = (small.clamp(0, 1) * 255).round().byte().numpy().tobytes()
    return {"height": size[0], "width": size[1], "data": base64.b64encode(data).decode("ascii")}


def code_colours(model) -> list[str]:
    """For each code the colour of the depth that a map of nothing else decodes to."""
    codes, length = model.config.depth_code_token_ids[1], model.config.span_length
    with torch.no_grad():
        depth = model.decode_depth(torch.arange(codes, device=model.device)[:, None].expand(codes, length))
    shades = np.asarray(colour_depth(depth.float().flatten(1).mean(1)[None].cpu().numpy()))[0]
    return ["#" + bytes(shade).hex() for shade in shades]
