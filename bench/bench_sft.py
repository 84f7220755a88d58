"""What a step of Perceptio's trainer costs beside TRL's own on the same InternVL and the same sequences.

    python bench/bench_sft.py [--rounds 2] [--turns 1] [--threads 2]

Every trainer runs its own `train()` in a process of its own and stops before each step until it is its turn: the
figures are medians of the ratios of steps that neighbour in time.  The clock on the wall is told beside that of the
processor, which other work on the machine hardly touches, as waiting threads sleep (OMP_WAIT_POLICY).  All start from
the same files, take the same ready-made batches (padding, pictures) and the same settings: LoRA of one rank on the
same layers, the same token rows and the projector, eager attention, bfloat16 autocast, gradient checkpointing, AdamW.

    perceptio   all losses, SAM2's features out of the cache (or SAM2's encoder in every step: "pixels")
    trl         `SFTTrainer`, told to score the learned positions alone, as it does on a GPU; with the new rows of the
                embedding, not those of the head, for which peft's wrapper lacks an attribute that TRL reads.  It so
                does less than ours, and is what the bars are held against
    trl, head   the same with that attribute put in, so that it trains the same rows as ours
    trl, all    the same as `trl`, but scoring every position, as TRL does on a CPU

Memory is the peak of the resident set from the second step on (VmHWM, reset after the first), whole and above what the
process held before the model was loaded.  Writes bench/results/sft.json.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from bench_backbone import backbone_of
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GotOcr2ImageProcessorPil, InternVLForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from perceptio.configuration_perceptio import PerceptioConfig
from perceptio.data.sequence import IGNORED
from perceptio.hub.tiny import tiny_mask_config
from perceptio.hub.tiny_text import tiny_tokenizer
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor, add_perception_tokens
from perceptio.train_sft import PerceptioSFTConfig, PerceptioSFTTrainer
from perceptio.training.adapters import peft_config
from perceptio.training.collator import PerceptioCollator
from perceptio.training.features import FeatureCache, encoder_name, fill_cache
from perceptio.training.models import depth_tokenizer
from perceptio.world.records import WorldOptions, world_records

VOCAB, CODES, GRID, TILE, TILE_TOKENS, SAM_SIDE, SAM_WIDTH = 32_000, 128, 10, 448, 256, 512, 128
BATCH, BATCHES, LORA_R = 1, 4, 32
MORE_STEPS = 10_000  # than any run here takes
TIME_BAR, MEMORY_BAR = 1.15, 1.10
CLOCKS = ("seconds", "cpu_seconds")
# What the processes of each comparison are: trainer and batches.
COMPARISONS = {
    "masks and depth": {
        "perceptio": ("perceptio", "features"),
        "perceptio, pixels": ("perceptio", "pixels"),
        "trl": ("trl", "features"),
        "trl, head": ("trl, head", "features"),
        "trl, all": ("trl, all", "features"),
    },
    "plain questions": {
        "perceptio": ("perceptio", "plain"),
        "trl": ("trl", "plain"),
        "trl, head": ("trl, head", "plain"),
    },
}


# The model, the processor and the batches, made once


def mask_config():
    """SAM2 of 3 M parameters beside 125 M: about the proportion of SAM2 large beside an InternVL of 8 B."""
    config = tiny_mask_config(SAM_SIDE)
    widths = [SAM_WIDTH // 4, SAM_WIDTH // 2, SAM_WIDTH, 2 * SAM_WIDTH]
    backbone = config.vision_config.backbone_config
    backbone.hidden_size, backbone.embed_dim_per_stage = widths[0], widths
    backbone.blocks_per_stage, backbone.global_attention_blocks = [1, 2, 7, 2], [5, 7]
    backbone.window_size_per_stage = [8, 4, 14, 7]
    config.vision_config.backbone_channel_list = widths[::-1]
    for part in (config.prompt_encoder_config, config.mask_decoder_config):
        part.hidden_size = SAM_WIDTH
    config.vision_config.fpn_hidden_size = SAM_WIDTH
    config.mask_decoder_config.mlp_dim = config.mask_decoder_config.iou_head_hidden_dim = 2 * SAM_WIDTH
    return config


def make_processor() -> tuple[PerceptioProcessor, dict]:
    tokenizer = tiny_tokenizer("qwen2")
    ids = add_perception_tokens(tokenizer, CODES)
    tiles = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        max_patches=1,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = PerceptioProcessor(
        image_processor=tiles,
        tokenizer=tokenizer,
        image_seq_length=TILE_TOKENS,
        sam_image_size=SAM_SIDE,
        num_depth_codes=CODES,
        depth_grid_size=GRID,
    )
    return processor, ids


def make_model(processor: PerceptioProcessor, ids: dict) -> PerceptioForConditionalGeneration:
    text = AutoConfig.for_model(
        "qwen2", vocab_size=VOCAB, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    vision = {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": TILE,
        "patch_size": 14,
    }
    config = PerceptioConfig(
        vision_config=vision,
        text_config=text,
        mask_config=mask_config(),
        depth_config={"grid_size": GRID, "num_codes": CODES},
        image_token_id=processor.image_token_id,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
        untrained=True,
        **ids,
    )
    torch.manual_seed(0)
    return PerceptioForConditionalGeneration(config).eval()


def as_plain(record: dict) -> dict:
    messages = [
        {**message, "perception": "none" if message["role"] == "assistant" else None} for message in record["messages"]
    ]
    return {**record, "messages": messages, "masks": [], "depth": None, "depth_codes": None}


def write_batches(folder: Path, model, processor, turns: int) -> dict:
    """The three kinds of batches as files; returns what they hold and what collating took."""
    records = list(world_records(BATCH * BATCHES, options=WorldOptions(TILE, TILE, turns, points=0.0)))[
        : BATCH * BATCHES
    ]
    cache = FeatureCache(folder / "features", encoder_name(model))
    fill_cache(cache, records, model, processor, progress=False)
    facts = {}
    for kind, features, rows in (
        ("features", cache, records),
        ("pixels", None, records),
        ("plain", None, [as_plain(record) for record in records]),
    ):
        collator = PerceptioCollator(processor, model.config, depth_tokenizer(model), features=features)
        start = time.perf_counter()
        batches = [collator(rows[index : index + BATCH]) for index in range(0, len(rows), BATCH)]
        facts[kind] = {
            "collating_seconds": (time.perf_counter() - start) / len(batches),
            "tokens": [list(batch["input_ids"].shape) for batch in batches],
            "learned": [int((batch["labels"] != IGNORED).sum()) for batch in batches],
            "masks": [len(batch["targets"]["mask_labels"]) for batch in batches],
            "spans": [len(batch["targets"]["depth_positions"]) for batch in batches],
        }
        save_file(flat(batches), folder / f"{kind}.safetensors")
    return facts


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def prepare(folder: Path, turns: int) -> dict:
    processor, ids = make_processor()
    model = make_model(processor, ids)
    facts = write_batches(folder, model, processor, turns)
    model.save_pretrained(folder / "perceptio")
    processor.save_pretrained(folder / "perceptio")
    backbone_of(model).save_pretrained(folder / "internvl")
    language = model.model.language_model
    sizes = {
        "language_model": count(language) + count(model.lm_head),
        "vocabulary": VOCAB,
        "width": language.config.hidden_size,
        "layers": language.config.num_hidden_layers,
        "vision_tower": count(model.model.vision_tower),
        "tile": [TILE, TILE_TOKENS],
        "sam2": count(model.mask_model),
        "mask_decoder": count(model.mask_model.mask_decoder),
        "sam2_side": SAM_SIDE,
        "sam2_width": SAM_WIDTH,
        "depth_tokenizer": count(model.depth_model),
        "span": GRID * GRID,
        "codes": CODES,
        "lora_r": LORA_R,
    }
    return {"sizes": sizes, "batches": facts}


# One trainer in a process of its own


class InTurn(TrainerCallback):
    """Waits for a line on standard input before each step; after it, says how long it took and the memory's peak."""

    def __init__(self, channel):
        self.channel, self.start, self.steps = channel, None, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.start is not None:
            self._report()
        if sys.stdin.readline().strip() != "step":
            os._exit(0)
        self.start = clocks()

    def _report(self):
        taken = [now - start for now, start in zip(clocks(), self.start, strict=True)]
        self.steps += 1
        answer = {"seconds": taken[0], "cpu_seconds": taken[1], "peak": memory("VmHWM")}
        if self.steps == 1:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.channel.write(json.dumps(answer) + "\n")
        self.channel.flush()


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def settings(kind: type[SFTConfig], folder: Path, **more) -> SFTConfig:
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=1,  # one entry of the data is a whole batch
        max_steps=MORE_STEPS,
        learning_rate=4e-5,
        weight_decay=0.05,
        gradient_checkpointing=True,
        logging_steps=MORE_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        max_length=None,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )


def own_trainer(folder: Path, batches: list[dict], data: Dataset, **options) -> PerceptioSFTTrainer:
    args = settings(PerceptioSFTConfig, folder / "out", lora_r=LORA_R, lora_alpha=2 * LORA_R)
    return PerceptioSFTTrainer(
        str(folder / "perceptio"),
        args,
        train_dataset=data,
        data_collator=lambda rows: copy.deepcopy(batches[rows[0]["batch"]]),
        **options,
    )


def peer_trainer(folder: Path, batches: list[dict], data: Dataset, kind: str, **options) -> SFTTrainer:
    if kind != "trl, all":
        trl_utils._use_triton = lambda device: True  # in this module it only says which positions are scored
    taken = ("input_ids", "attention_mask", "labels", "pixel_values")
    batches = [{name: batch[name] for name in taken} for batch in batches]
    model = InternVLForConditionalGeneration.from_pretrained(
        folder / "internvl", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.device("meta"):
        sketch = PerceptioForConditionalGeneration(PerceptioConfig.from_pretrained(folder / "perceptio"))
    lora = peft_config(sketch, LORA_R, 2 * LORA_R, 0.05)
    lora.modules_to_save = [name for name in lora.modules_to_save if name in dict(model.named_modules())]
    if kind != "trl, head":
        del lora.trainable_token_indices["lm_head"]
    trainer = SFTTrainer(
        model,
        settings(SFTConfig, folder / "out"),
        train_dataset=data,
        data_collator=lambda rows: copy.deepcopy(batches[rows[0]["batch"]]),
        processing_class=PerceptioProcessor.from_pretrained(folder / "perceptio"),
        peft_config=lora,
        **options,
    )
    if kind == "trl, head":
        trainer.model.get_base_model().lm_head.bias = None
    return trainer


def flat(value, name: str = "") -> dict[str, torch.Tensor]:
    """Batches as tensors by their path; whole numbers become tensors, and names of samples stay behind."""
    if isinstance(value, torch.Tensor):
        return {name: value.contiguous()}
    if isinstance(value, int):
        return {f"{name}:int": torch.tensor(value)}
    if isinstance(value, str):
        return {}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: tensor for part, inner in pairs for key, tensor in flat(inner, f"{name}/{part}").items()}


def nested(tensors: dict[str, torch.Tensor]) -> list[dict]:
    """The batches again."""
    tree: dict = {}
    for name, tensor in tensors.items():
        *path, last = name.strip("/").split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last.removesuffix(":int")] = int(tensor) if last.endswith(":int") else tensor
    batches = [tree[str(index)] for index in range(len(tree))]
    for batch in batches:
        batch |= {"sample_ids": [], "skipped": []}
        if features := batch.get("targets", {}).get("sam_features"):
            batch["targets"]["sam_features"] = [features[str(index)] for index in range(len(features))]
    return batches


def be_trainer(folder: Path, trainer: str, kind: str) -> None:
    """The life of a child: everything that the library prints goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    batches = nested(load_file(folder / f"{kind}.safetensors"))
    data = Dataset.from_dict({"batch": [index % BATCHES for index in range(4 * MORE_STEPS)]})
    before = memory("VmRSS")
    turn = InTurn(channel)
    with tempfile.TemporaryDirectory() as out:
        os.symlink(folder / "perceptio", Path(out) / "perceptio")
        os.symlink(folder / "internvl", Path(out) / "internvl")
        if trainer == "perceptio":
            built = own_trainer(Path(out), batches, data, callbacks=[turn])
        else:
            built = peer_trainer(Path(out), batches, data, trainer, callbacks=[turn])
        trained = sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad)
        channel.write(json.dumps({"before": before, "trained": trained}) + "\n")
        channel.flush()
        built.train()


# All of them in turn


class Child:
    def __init__(self, folder: Path, trainer: str, kind: str, log):
        command = [sys.executable, __file__, "--folder", str(folder), "--trainer", trainer, "--kind", kind]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        return self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a trainer ended with exit code {self.process.wait()}; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(folder: Path, runs: dict, rounds: int) -> dict:
    """Rounds over the batches; within a round every trainer takes every batch, in an order that turns."""
    children = {name: Child(folder, *run, log=None) for name, run in runs.items()}
    try:
        facts = {name: child.read() for name, child in children.items()}
        for child in children.values():
            child.step()
        steps: dict[str, list[dict]] = {name: [] for name in runs}
        names = list(runs)
        for number in range(rounds * BATCHES):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                steps[name].append(children[name].step())
    finally:
        for child in children.values():
            child.close()
    return {name: summary(steps[name], facts[name]) for name in names}


def summary(steps: list[dict], facts: dict) -> dict:
    peak = max(step["peak"] for step in steps)
    times = {clock: [step[clock] for step in steps] for clock in CLOCKS}
    return {
        **{clock: statistics.median(times[clock]) for clock in CLOCKS},
        "peak_bytes": peak,
        "peak_above_start": peak - facts["before"],
        "trained": facts["trained"],
        "steps": {clock: [round(value, 3) for value in times[clock]] for clock in CLOCKS},
    }


def ratios(found: dict, ours: str, peer: str) -> dict:
    result = {}
    for clock, name in zip(CLOCKS, ("time", "cpu_time"), strict=True):
        pairs = zip(found[ours]["steps"][clock], found[peer]["steps"][clock], strict=True)
        values = sorted(a / b for a, b in pairs)
        quarter = len(values) // 4
        result |= {name: statistics.median(values), f"{name}_middle_half": [values[quarter], values[-1 - quarter]]}
    return {
        **result,
        "memory": found[ours]["peak_bytes"] / found[peer]["peak_bytes"],
        "memory_above_start": found[ours]["peak_above_start"] / found[peer]["peak_above_start"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="each over all batches")
    parser.add_argument("--turns", type=int, default=1, help="questions on one picture, each with a mask")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer:
        return be_trainer(arguments.folder, arguments.trainer, arguments.kind)
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "passive"}
    torch.set_num_threads(arguments.threads)
    packages = ("torch", "transformers", "trl", "peft")
    results = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": arguments.threads,
        "turns": arguments.turns,
        "steps": arguments.rounds * BATCHES,
        "load_at_start": os.getloadavg()[0],
        "bars": {"time": TIME_BAR, "memory": MEMORY_BAR},
    }
    with tempfile.TemporaryDirectory() as folder:
        results |= prepare(Path(folder), arguments.turns)
        for title, runs in COMPARISONS.items():
            found = compare(Path(folder), runs, arguments.rounds)
            pairs = [(ours, peer) for ours in runs for peer in runs if ours.startswith("p") and peer.startswith("t")]
            against = {f"{ours} / {peer}": ratios(found, ours, peer) for ours, peer in pairs}
            results[title] = {"runs": found, "ratios": against}
            show(title, found, against)
    target = Path(__file__).parent / "results" / "sft.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(title: str, found: dict, against: dict) -> None:
    print(f"\n{title:<24}{'s/step':>9}{'CPU s':>9}{'peak MiB':>10}{'above start':>13}")
    for name, run in found.items():
        sizes = f"{run['peak_bytes'] / 2**20:>10.0f}{run['peak_above_start'] / 2**20:>13.0f}"
        print(f"  {name:<22}{run['seconds']:>9.3f}{run['cpu_seconds']:>9.3f}{sizes}")
    print(f"  {'ratios':<30}{'time':>18}{'CPU time':>24}{'memory':>12}{'above start':>13}")
    for name, ratio in against.items():
        times = [
            f"{ratio[clock]:.3f} ({ratio[clock + '_middle_half'][0]:.3f} to {ratio[clock + '_middle_half'][1]:.3f})"
            for clock in ("time", "cpu_time")
        ]
        print(f"  {name:<28}{times[0]:>24}{times[1]:>24}{ratio['memory']:>8.3f}{ratio['memory_above_start']:>13.3f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
