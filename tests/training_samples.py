"""Small models and data for tests of training, and steps of the trainer taken by hand."""

import copy

import torch
from datasets import Dataset
from transformers import AutoConfig

from perceptio.data.masks import encode_mask
from perceptio.data.record import assistant, make_record, user
from perceptio.hub.tiny import tiny_config
from perceptio.hub.tiny_text import tiny_processor
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor, add_perception_tokens
from perceptio.train_sft import PerceptioSFTConfig, PerceptioSFTTrainer
from perceptio.world.records import scene_records

PLAIN = {
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "mask_points": 0,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
}


def build(folder, tied: bool = False, width: int = 32, seed: int = 0):
    """A base like that of `build_untrained`, but with ends that may be apart and of any width."""
    torch.manual_seed(seed)
    processor = tiny_processor("qwen2", grid_size=3, num_codes=8)
    ids = add_perception_tokens(processor.tokenizer, 8)
    vocabulary = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    config = tiny_config(**vocabulary, tie_word_embeddings=tied, **ids)
    values = {**config.text_config.to_dict(), "hidden_size": width, "intermediate_size": 2 * width}
    config.text_config = AutoConfig.for_model("qwen2", **{k: v for k, v in values.items() if k != "model_type"})
    model = PerceptioForConditionalGeneration(config)
    model.config.depth_config.codebook_hash = model.depth_model.codebook_hash()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    model = PerceptioForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model, PerceptioProcessor.from_pretrained(folder)


def records(count: int) -> list[dict]:
    """Of rendered scenes, each with a mask, a depth span and an answer."""
    found, index = [], 0
    while len(found) < count:
        found += scene_records(index)
        index += 1
    return found[:count]


def plain(record: dict) -> dict:
    """The same question with nothing but an answer."""
    messages = [{**m, "perception": "none" if m["role"] == "assistant" else None} for m in record["messages"]]
    return {**record, "messages": messages, "masks": [], "depth": None, "depth_codes": None, "depth_codebook": None}


def text_only(name: str = "text") -> dict:
    messages = [user("What is one and one?"), assistant("Two.")]
    return make_record(id=name, image=None, messages=messages, source="tests", licence="CC0-1.0")


def masked(record: dict) -> dict:
    """The record without its depth."""
    kept = [m for m in record["messages"] if m["perception"] in (None, "seg", "seg+depth")]
    messages = [{**m, "perception": "seg" if m["role"] == "assistant" else None} for m in kept]
    return {**record, "messages": messages, "depth": None, "depth_codes": None, "depth_codebook": None}


def absent(record: dict) -> dict:
    """The record with masks that show nothing."""
    empty = [{**mask, **encode_mask(torch.zeros(mask["size"]).bool().numpy())} for mask in record["masks"]]
    return {**record, "masks": empty}


def trainer_of(folder, rows: list[dict], out, before=None, held_out=None, **changes) -> PerceptioSFTTrainer:
    """before: called when the processes have met, before there is a trainer."""
    model, processor = load(folder)
    args = PerceptioSFTConfig(str(out), **{**PLAIN, **changes})
    if before is not None and args.device is not None:
        before()
    return PerceptioSFTTrainer(model, args, Dataset.from_list(rows), held_out, processing_class=processor)


def gradients(trainer: PerceptioSFTTrainer, batches: list[list[dict]]) -> dict[str, torch.Tensor]:
    """What one optimizer step would see, by the trainer's own path: a micro-batch for each list of records."""
    collated = [copy.deepcopy(trainer.data_collator(rows)) for rows in batches]
    samples, count = trainer.get_batch_samples(iter(collated), len(collated), trainer.args.device)
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in samples:
        trainer.training_step(trainer.model, batch, count)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
