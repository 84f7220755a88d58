"""One page that shows what the model will see: pictures, masks, depth, and the sequence that is learned."""

import base64
import os
from html import escape
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..drawing import MASK_COLOURS, colour_depth, lay_mask_over
from ..processing_perceptio import load_picture
from .check import Report
from .depths import decode_depth
from .load import row_jobs
from .masks import decode_mask
from .record import OPENING, DataError
from .sequence import build_sequence

SIDE = 480  # of a picture on the page
STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --ink: #1c1e22; --soft: #60646c; --line: #d8d8d2; --warn: #b02000;
  --card: #ffffff; --code: #f2f2ee }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --ink: #ececea; --soft: #a0a4ac; --line: #3a3c42;
  --warn: #ff8a66; --card: #202226; --code: #2a2c31 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.05rem; margin: 0 0 .75rem; overflow-wrap: anywhere }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  margin: 1.25rem 0 }
.pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
figure { margin: 0 } img { width: 100%; height: auto; display: block; border-radius: .25rem }
figcaption, .tags, .soft { color: var(--soft); font-size: .875rem } .tags { margin: 0 0 .75rem }
.ramp { height: .6rem; border-radius: .2rem; margin: .35rem 0 0;
  background: linear-gradient(90deg, #041850, #07375b, #1c5364, #386f6b, #598a70, #80a372, #acbc73, #dbd370, #ffea69) }
.ends { display: flex; justify-content: space-between }
dl { margin: 1rem 0 0 } dt { color: var(--soft) }
dd { margin: 0 0 .5rem; overflow-wrap: anywhere; white-space: pre-wrap }
pre { background: var(--code); padding: .75rem; border-radius: .25rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .8125rem; margin: .5rem 0 0 }
.problem { color: var(--warn) } ul { padding-left: 1.25rem } li { overflow-wrap: anywhere } summary { cursor: pointer }
"""


def write_preview(spec, out, model=None, count: int = 24, **options) -> Report:
    """Write the page for the first `count` good rows of `spec`; problems that were met on the way stand on top.

    model: a Perceptio folder or id, whose processor writes the exact tokens and whose depth tokenizer the codes.
    """
    if count < 1:
        raise ValueError(f"`count` is {count}, expected at least 1")
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} does not exist: create it, or write elsewhere")
    processor, vqvae = _open_model(model)
    report, records = Report(), []
    for job in row_jobs(spec, **options):
        found = job()
        report.add(found)
        if found.record is not None:
            records.append(found.record)
        if len(records) == count:
            break
    report.finish()
    articles = "\n".join(_article(record, processor, vqvae) for record in records)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Preview of {escape(Path(str(spec)).name)}</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>What the model will see</h1>{_summary(str(spec), report)}</header>\n"
        f"<main>{articles}</main></body></html>\n"
    )
    partial = out.with_name(out.name + ".incomplete")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return report


def _open_model(model):
    if model is None:
        return None, None
    from transformers import AutoProcessor

    import perceptio  # noqa: F401 (registers the processor)

    from .label import load_vqvae

    return AutoProcessor.from_pretrained(model), load_vqvae(model)


def _summary(spec: str, report: Report) -> str:
    lines = list(report.lines(50))
    items = "".join(
        f'<li class="{"problem" if line.startswith("problem") else "soft"}">{escape(line)}</li>' for line in lines
    )
    return (
        f'<p class="soft">{escape(spec)}: the first {report.kept} good rows of {report.read} read.</p><ul>{items}</ul>'
    )


def _article(record: dict, processor, vqvae) -> str:
    figures = "".join(_figures(record))
    turns = "".join(
        f"<dt>{escape(message['role'])}{_mode(message)}</dt><dd>{escape(message['content'])}</dd>"
        for message in record["messages"]
    )
    tags = " · ".join(escape(record[name]) for name in ("source", "licence", "split"))
    pictures = f'<div class="pictures">{figures}</div>' if figures else '<p class="soft">No picture: text alone.</p>'
    return (
        f'<article><h2>{escape(record["id"])}</h2><p class="tags">{tags}</p>{pictures}<dl>{turns}</dl>'
        f"{_sequence(record, processor, vqvae)}</article>"
    )


def _mode(message: dict) -> str:
    return f" ({escape(message['perception'])})" if message.get("perception") else ""


def _figures(record: dict):
    if record["image"] is None:
        return
    photo = load_picture(record["image"]["bytes"])
    size = f"{photo.width} × {photo.height} pixels"
    photo.thumbnail((SIDE, SIDE))
    yield _figure(photo, "the picture", f"the picture, {size}")
    if record["masks"]:
        shown, absent = photo, 0
        for index, rle in enumerate(record["masks"]):
            mask = decode_mask(rle)
            absent += not mask.any()
            if mask.any():
                picture = Image.fromarray(mask.astype(np.uint8) * 255)
                shown = lay_mask_over(shown, picture, MASK_COLOURS[index % len(MASK_COLOURS)])
        told = f"{len(record['masks'])} masks" if len(record["masks"]) > 1 else "the mask"
        yield _figure(shown, told, f"{told}, {absent} of them empty: not in the picture" if absent else told)
    if record["depth"] is not None:
        depth = decode_depth(record["depth"]["bytes"])
        picture = colour_depth(depth).resize(photo.size, Image.Resampling.BILINEAR)
        legend = '<div class="ramp"></div><span class="ends"><span>far (0)</span><span>near (1)</span></span>'
        yield _figure(picture, "the depth map", legend, escaped=True)


def _figure(picture: Image.Image, alt: str, caption: str, escaped: bool = False) -> str:
    file = BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = caption if escaped else escape(caption)
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{text}</figcaption></figure>'
    )


def _sequence(record: dict, processor, vqvae) -> str:
    """The exact tokens with a model; without one, how each answer begins."""
    if processor is None:
        answers = [turn for turn, message in enumerate(record["messages"]) if message["role"] == "assistant"]
        lines = [_layout(record, turn) for turn in answers]
        return f"<pre>{escape(chr(10).join(lines))}</pre>"
    codes = record["depth_codes"]
    try:
        if codes is None and record["depth"] is not None:
            from .label import encode_codes, finish_depth

            depth = decode_depth(record["depth"]["bytes"])
            codes = encode_codes(finish_depth(depth, depth.shape[::-1]), vqvae)
        sequence = build_sequence(record, processor, codes)
    except DataError as error:
        return f'<p class="problem">{escape(str(error))}</p>'
    learned = sum(label >= 0 for label in sequence.labels)
    told = f"{len(sequence.input_ids)} tokens, {learned} of them learned"
    return f"<details><summary>The exact sequence: {told}</summary><pre>{escape(sequence.text)}</pre></details>"


def _layout(record: dict, turn: int) -> str:
    message = record["messages"][turn]
    mode, text = message["perception"] or "none", message["content"]
    offsets = [mask["offset"] for mask in record["masks"] if mask["turn"] == turn and mask["offset"] != OPENING]
    cuts = [0, *offsets, len(text)]
    answer = " [SEG] ".join(text[a:b] for a, b in zip(cuts, islice(cuts, 1, None), strict=False))
    opening = ("[SEG] " if "seg" in mode else "") + ("<d_start> d … d <d_end> " if "depth" in mode else "")
    return opening + answer
