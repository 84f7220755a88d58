"""One page of a run: its figures, and the best and the worst predictions with the truth beside them."""

import base64
import json
import os
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.depths import decode_depth
from ..data.masks import decode_mask
from ..data.page import STYLE
from ..drawing import draw_result
from ..processing_perceptio import PictureError, load_picture
from .benchmark import OBJECT_THRESHOLD, Benchmark, Figure, Item, Judgement, Prediction
from .depth import resize

WIDTH = 900  # of a picture on the page
TABLE = """
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
"""


@dataclass(frozen=True)
class Example:
    item: Item
    prediction: Prediction
    judgement: Judgement


def write_page(path: Path, benchmark: Benchmark, results: dict, best: list[Example], worst: list[Example]) -> None:
    """Whole or not at all."""
    parts = [_part(benchmark, "The best", best), _part(benchmark, "The worst", worst)]
    title = escape(f"{results['benchmark']}, {results['split']}")
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{TABLE}</style></head>\n<body>"
        f"<header><h1>{title}</h1>{_figures(results)}</header>\n<main>{''.join(parts)}</main></body></html>\n"
    )
    half = path.with_name(f".{path.name}.incomplete")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def _figures(results: dict) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in Figure(**figure).cells()) + "</tr>"
        for figure in results["figures"]
    )
    head = "".join(f"<th>{name}</th>" for name in Figure.HEAD)
    invalid = ", ".join(f"{count} × {reason}" for reason, count in results["invalid"].items())
    told = f"{results['items']} items; " + (f"invalid: {invalid}" if invalid else "none invalid")
    settings = json.dumps(results["settings"], ensure_ascii=False, indent=2)
    return (
        f'<table><tr>{head}</tr>{rows}</table><p class="soft">{escape(told)}</p>'
        f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
    )


def _part(benchmark: Benchmark, title: str, examples: list[Example]) -> str:
    articles = "".join(_article(benchmark, example) for example in examples)
    return f"<section><h1>{title}</h1>{articles}</section>" if articles else ""


def _article(benchmark: Benchmark, example: Example) -> str:
    item, judgement = example.item, example.judgement
    notes = [f"quality {judgement.quality:.3f}"] + ([f"invalid: {judgement.invalid}"] if judgement.invalid else [])
    drawn = "".join(_figure(*pair) for pair in _drawings(benchmark, example))
    return (
        f'<article><h2>{escape(item.id)}</h2><p class="tags">{escape(" · ".join(notes))}</p>'
        f'<div class="pictures">{drawn}</div></article>'
    )


def _drawings(benchmark: Benchmark, example: Example):
    """(picture, what it is): the prediction and the truth."""
    item, prediction = example.item, example.prediction
    if not item.pictures:
        return
    try:
        photo = load_picture(item.pictures[0])
    except PictureError:
        return
    shape = photo.height, photo.width
    depth, seg = prediction.depth, "seg" in prediction.perception
    masks = [_picture(mask) if mask["object_score"] >= OBJECT_THRESHOLD else None for mask in prediction.masks]
    yield (
        draw_result(
            photo,
            item.question,
            prediction.answer,
            masks=masks if seg else None,
            depth=None if depth is None else resize(depth, shape),
            notes=prediction.problems,
        ),
        "prediction",
    )
    true, depth = benchmark.true_mask(item), item.depth
    yield (
        draw_result(
            photo,
            item.question,
            benchmark.true_answer(item) or "",
            masks=None if true is None else [_picture(true) if decode_mask(true).any() else None],
            depth=None if depth is None else decode_depth(depth),
        ),
        "truth",
    )


def _picture(rle: dict) -> Image.Image:
    return Image.fromarray(decode_mask(rle).astype(np.uint8) * 255)


def _figure(picture: Image.Image, caption: str) -> str:
    picture.thumbnail((WIDTH, WIDTH))
    file = BytesIO()
    picture.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(caption)}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{escape(caption)}</figcaption></figure>'
    )
