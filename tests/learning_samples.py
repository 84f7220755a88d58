"""Records to learn from, and a small model with its processor, built once for all tests."""

from functools import cache

import numpy as np
from own_samples import jpeg

from perceptio.data.depths import encode_depth
from perceptio.data.masks import encode_mask
from perceptio.data.record import assistant, make_record, user
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor
from perceptio.training.collator import PerceptioCollator
from perceptio.world.records import WorldOptions, world_records

HEIGHT, WIDTH = 48, 64
SIDE = 16  # of mask logits
SPAN, CODES = 9, 8
NAN = float("nan")


@cache
def load_tiny(folder):
    """(model, processor).  Shared: a test that changes the model takes a copy."""
    model = PerceptioForConditionalGeneration.from_pretrained(folder)  # in the mode of inference
    return model, PerceptioProcessor.from_pretrained(folder)


def collator_of(model, processor, **options) -> PerceptioCollator:
    return PerceptioCollator(processor, model.config, model.depth_model, **options)


@cache
def world() -> tuple[dict, ...]:
    """Rendered scenes with several turns, masks, some of them empty, and depth."""
    return tuple(world_records(5, options=WorldOptions(width=96, height=64), workers=0))


def box(top=0, left=0, bottom=HEIGHT, right=WIDTH, height=HEIGHT, width=WIDTH) -> dict:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return encode_mask(mask)


def empty() -> dict:
    return box(bottom=0)


def slope(height=HEIGHT, width=WIDTH) -> np.ndarray:
    """Depth that grows to the right."""
    return np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))


def record(name="a", masks=(), depth=None, codes=None, picture=True, question="Where is it?", **changes) -> dict:
    """One question; the first mask opens the answer, the others stand in it."""
    asked = [word for word, there in (("seg", masks), ("depth", depth is not None or codes is not None)) if there]
    placed = [{**mask, "offset": 3 * index or -1} for index, mask in enumerate(masks)]
    values = {
        "id": name,
        "image": jpeg(WIDTH, HEIGHT, seed=sum(name.encode())) if picture else None,
        "messages": [user(question), assistant("Here it is, I think.", "+".join(asked) or "none")],
        "masks": placed,
        "depth": encode_depth(depth) if isinstance(depth, np.ndarray) else depth,
        "depth_codes": codes,
        "source": "own",
        "licence": "CC0-1.0",
    }
    return make_record(**{**values, **changes})


def some_of_each() -> list[dict]:
    """All that a record may have and lack."""
    return [
        record("both", [box(bottom=20), box(left=40)], depth=slope()),
        record("words", picture=False),
        record("mask", [box(10, 10, 30, 50)]),
        record("absent", [empty()]),
        record("depth", depth=slope()[:, ::-1]),
        record("codes", codes=[3, 1, 4, 1, 5, 2, 6, 5, 3]),
        record("picture"),
    ]


def inputs_of(batch: dict) -> dict:
    """What of a batch the model takes."""
    return {name: value for name, value in batch.items() if name not in ("sample_ids", "skipped")}
