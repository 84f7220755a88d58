"""Everything together can be learned: sixteen pictures by heart, masks, codes and answers."""

import random
from io import BytesIO

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from training_samples import PLAIN
from transformers import AutoConfig

from perceptio.data.depths import encode_depth
from perceptio.data.label import encode_codes
from perceptio.data.masks import encode_mask
from perceptio.data.record import assistant, make_record, user
from perceptio.hub.tiny import tiny_config, tiny_mask_config
from perceptio.hub.tiny_text import tiny_processor
from perceptio.hub.untrained import generation_defaults
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.pipeline_perceptio import PerceptioPipeline
from perceptio.processing_perceptio import add_perception_tokens
from perceptio.train_sft import PerceptioSFTConfig, PerceptioSFTTrainer
from perceptio.training.features import FeatureCache, encoder_name, fill_cache

COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 200), "green": (40, 160, 60), "yellow": (220, 200, 40)}
SIDE, COUNT, CELL = 64, 16, 4
SAM_SIDE = 4 * SIDE  # SAM2 writes its masks at a quarter of its side: at the pictures' own size


def two_boxes(index: int) -> tuple[dict, dict]:
    """A record on one of two boxes, and the truth: its mask, depth and answer."""
    rng = random.Random(index)
    names = rng.sample(sorted(COLOURS), 2)
    picture = Image.new("RGB", (SIDE, SIDE), (120 + rng.randrange(-30, 30),) * 3)
    depth = np.tile(np.linspace(0.1, 0.4, SIDE, dtype=np.float32)[:, None], (1, SIDE))
    masks = []
    for place, name in enumerate(names):
        width, height = CELL * rng.randrange(4, 7), CELL * rng.randrange(4, 7)
        left, top = 32 * place + CELL * rng.randrange(1 + (32 - width) // CELL), CELL * rng.randrange(9)
        ImageDraw.Draw(picture).rectangle((left, top, left + width - 1, top + height - 1), fill=COLOURS[name])
        masks.append(np.zeros((SIDE, SIDE), bool))
        masks[-1][top : top + height, left : left + width] = True
        depth[masks[-1]] = rng.uniform(0.5, 1)
    chosen, file = rng.randrange(2), BytesIO()
    picture.save(file, "PNG")
    nearer = depth[masks[chosen]].mean() > depth[masks[1 - chosen]].mean()
    answer = f"On the {('left', 'right')[chosen]}, {'nearer' if nearer else 'farther'}."
    question = f"Where is the {names[chosen]} box?"
    record = make_record(
        id=f"boxes-{index}",
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
    processor.sam_image_size = SAM_SIDE
    ids = add_perception_tokens(processor.tokenizer, 16)
    size = len(processor.tokenizer)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = AutoConfig.for_model("qwen2", vocab_size=size, num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    parts = {"text_config": text, "mask_config": tiny_mask_config(SAM_SIDE)}
    config = tiny_config("qwen2", size, 4, 16, image_token_id=processor.image_token_id, **parts, **ids)
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


def test_sixteen_pictures_are_learned_by_heart(tmp_path):
    model, processor = small_model()
    records, truths = zip(*map(two_boxes, range(COUNT)), strict=True)
    changes = {"full": True, "learning_rate": 4e-3, "max_steps": 200, "per_device_train_batch_size": COUNT,
               "seg_bce_weight": 8.0, "seg_dice_weight": 4.0, "adam_beta2": 0.98, "weight_decay": 0.0, "panels": 0,
               "logging_steps": 50}  # fmt: skip
    args = PerceptioSFTConfig(str(tmp_path), **{**PLAIN, **changes})
    dataset = Dataset.from_list(list(records))
    cache = FeatureCache(tmp_path / "features", encoder_name(model), torch.float32)
    fill_cache(cache, records, model, processor, progress=False)
    trainer = PerceptioSFTTrainer(model, args, dataset, dataset, processing_class=processor, features=cache)
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
