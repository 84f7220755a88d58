"""Everything together can be learned: sixteen pictures by heart, masks, codes and answers."""

import random
from io import BytesIO

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from training_samples import PLAIN
from transformers import AutoConfig

from perceptio.data.depths import encode_depth
from perceptio.data.label import encode_codes
from perceptio.data.masks import encode_mask
from perceptio.data.record import assistant, make_record, user
from perceptio.hub.tiny import tiny_config
from perceptio.hub.tiny_text import tiny_processor
from perceptio.hub.untrained import generation_defaults
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.pipeline_perceptio import PerceptioPipeline
from perceptio.processing_perceptio import add_perception_tokens
from perceptio.train_sft import PerceptioSFTConfig, PerceptioSFTTrainer

COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 200), "green": (40, 160, 60), "yellow": (220, 200, 40)}
SIDE, COUNT = 64, 16


def two_discs(index: int) -> tuple[dict, dict]:
    """A record on one of two discs, and the truth: its mask, depth and answer."""
    rng = random.Random(index)
    names = rng.sample(sorted(COLOURS), 2)
    picture = Image.new("RGB", (SIDE, SIDE), (120 + rng.randrange(-30, 30),) * 3)
    depth = np.tile(np.linspace(0.1, 0.4, SIDE, dtype=np.float32)[:, None], (1, SIDE))
    ys, xs = np.mgrid[:SIDE, :SIDE]
    masks = []
    for place, name in enumerate(names):
        radius, x, y = rng.randrange(12, 16), 16 + 32 * place + rng.randrange(-3, 4), rng.randrange(16, 48)
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[name])
        masks.append((xs - x) ** 2 + (ys - y) ** 2 <= radius**2)
        depth[masks[-1]] = rng.uniform(0.5, 1)
    chosen, file = rng.randrange(2), BytesIO()
    picture.save(file, "PNG")
    nearer = depth[masks[chosen]].mean() > depth[masks[1 - chosen]].mean()
    answer = f"On the {('left', 'right')[chosen]}, {'nearer' if nearer else 'farther'}."
    question = f"Where is the {names[chosen]} disc?"
    record = make_record(
        id=f"discs-{index}",
        image=file.getvalue(),
        messages=[user(question), assistant(answer, "seg+depth")],
        masks=[encode_mask(masks[chosen])],
        depth=encode_depth(depth),
        source="tests",
        licence="CC0-1.0",
    )
    return record, {"picture": picture, "question": question, "answer": answer, "mask": masks[chosen], "depth": depth}


def small_model():
    torch.manual_seed(0)
    processor = tiny_processor("qwen2", grid_size=4, num_codes=16, max_patches=1)
    ids = add_perception_tokens(processor.tokenizer, 16)
    size = len(processor.tokenizer)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = AutoConfig.for_model("qwen2", vocab_size=size, num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    image_token_id = processor.image_token_id
    config = tiny_config("qwen2", size, 4, 16, image_token_id=image_token_id, text_config=text, **ids)
    model = PerceptioForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    for module in model.mask_model.modules():  # frozen features of the library's small start tell next to nothing
        if hasattr(module, "reset_parameters") and not isinstance(module, torch.nn.Embedding):
            module.reset_parameters()
    config.depth_config.codebook_hash = model.depth_model.codebook_hash()
    model.generation_config = generation_defaults(config, processor.tokenizer, answer_tokens=40)
    return model, processor


def iou(found: Image.Image | None, expected: np.ndarray) -> float:
    mask = np.zeros_like(expected) if found is None else np.asarray(found) > 127
    return (mask & expected).sum() / (mask | expected).sum()


@pytest.mark.timeout(600)
def test_sixteen_pictures_are_learned_by_heart(tmp_path):
    model, processor = small_model()
    records, truths = zip(*map(two_discs, range(COUNT)), strict=True)
    changes = {"full": True, "learning_rate": 3e-3, "max_steps": 320, "per_device_train_batch_size": COUNT,
               "seg_bce_weight": 4.0, "seg_dice_weight": 2.0, "adam_beta2": 0.98, "weight_decay": 0.0, "panels": 0,
               "logging_steps": 50}  # fmt: skip
    args = PerceptioSFTConfig(str(tmp_path), **{**PLAIN, **changes})
    dataset = Dataset.from_list(list(records))
    trainer = PerceptioSFTTrainer(model, args, dataset, dataset, processing_class=processor)
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_span_validity"] == 1 and figures["eval_answer_accuracy"] == 1, figures
    assert figures["eval_code_accuracy"] >= 0.99 and figures["eval_mask_iou"] >= 0.95, figures
    # The same by generating, at the pictures' own size.
    pipe = PerceptioPipeline(model=model.eval(), processor=processor)
    questions = [{"image": truth["picture"], "text": truth["question"]} for truth in truths]
    found = pipe(questions, batch_size=COUNT, perception="seg+depth")
    assert [one["generated_text"] for one in found] == [truth["answer"] for truth in truths]
    assert not any(one["problems"] for one in found)
    codes = np.array([one["depth_codes"] for one in found])
    expected = np.array([encode_codes(truth["depth"], model.depth_model) for truth in truths])
    assert (codes == expected).mean() >= 0.99
    assert np.mean([iou(one["mask"], truth["mask"]) for one, truth in zip(found, truths, strict=True)]) >= 0.95
