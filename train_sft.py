"""Fine-tune Perceptio on your own data, on one CPU or many GPUs.

    python train_sft.py --config recipes/perceptio-8b.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml train_sft.py --config my_data.yaml

Every field below can stand in the YAML file or on the command line, which wins.  `--dry_run` loads everything, runs
one batch and says what the whole run will take.  A killed run goes on with `--resume`.  docs/finetune.md is the guide.

Exit codes: 0 done, 2 wrong input or a run that cannot go on, 75 stopped by SIGTERM with a whole checkpoint written (a
scheduler should queue it again), 130 by Ctrl-C.
"""

import logging
import sys
from collections import defaultdict
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoProcessor, Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import has_length

from perceptio.extras import extra

with extra("train", "fine-tuning needs"):
    import peft  # noqa: F401
    from accelerate import PartialState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer, TrlParser

from perceptio.cli import forgive_encodings, refuse
from perceptio.losses_perceptio import COUNTED, COUNTS, DEFAULT_WEIGHTS, TERMS
from perceptio.modeling_depth_vqvae import DepthVQVAE
from perceptio.training.adapters import trainable_table
from perceptio.training.checkpoints import EXIT_CODES, SafeCheckpoints, checkpoints
from perceptio.training.collator import PerceptioCollator
from perceptio.training.data import RunData, as_records, check_lengths, record_lengths
from perceptio.training.features import FeatureCache, open_cache
from perceptio.training.guard import GuardedSteps, NoMemory, check_trackers
from perceptio.training.models import (
    cast_trained,
    depth_tokenizer,
    ends_in_root,
    is_sharded,
    load_model,
    prepare_training,
)
from perceptio.training.muon import MuonTraining
from perceptio.training.noise import with_code_noise
from perceptio.training.panels import draw_panels, show_panels
from perceptio.training.rehearsal import LAYOUT, rehearse, rehearse_layout
from perceptio.training.result import (
    MODEL,
    check_base_is_public,
    explain_push,
    finish_folder,
    push_folder,
    save_result,
    tokenizer_hash,
)
from perceptio.training.skipped import note_skipped

logger = logging.getLogger(__name__)
SEED_STEP = 1_000_003


@dataclass
class RunArguments:
    """What a run is made of."""

    model: str = field(metadata={"help": "folder or Hub id of the Perceptio to fine-tune"})
    data: str = field(
        metadata={"help": "data recipe (YAML), folder, folder of shards, .jsonl file, or Hub id of a data set"}
    )
    split: str = field(default="train", metadata={"help": "split of a folder or data set to train on"})
    eval_data: str | None = field(default=None, metadata={"help": "the same, to evaluate on; each source by itself"})
    eval_split: str = field(default="validation", metadata={"help": "split of a folder or data set to evaluate on"})
    eval_samples: int | None = field(default=200, metadata={"help": "of each source"})
    qlora: bool = field(default=False, metadata={"help": "the language model in 4 bits (needs bitsandbytes)"})
    merge: bool = field(default=False, metadata={"help": "write a whole model in place of an adapter"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest whole checkpoint"})
    samples: int | None = field(default=None, metadata={"help": "train on that many records in place of epochs"})
    dry_run: bool = field(default=False, metadata={"help": "load everything, run one batch, and say what it takes"})
    gpu: str = field(default="A100-80GB", metadata={"help": "for the estimate of a dry run"})
    gpus: int = field(default=8, metadata={"help": "the same, with `--model layout:8b`, which needs no file"})


@dataclass
class PerceptioSFTConfig(SFTConfig):
    """TRL's `SFTConfig` and what is Perceptio's own.  The defaults are those of the paper's ancestors."""

    full: bool = field(default=False, metadata={"help": "train all of the language model in place of LoRA"})
    train_vision: bool = field(default=True, metadata={"help": "with `full`: the vision tower too"})
    lora_r: int = field(default=128, metadata={"help": "rank of LoRA on the language model"})
    lora_alpha: int = field(default=256, metadata={"help": "scale of LoRA"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of LoRA"})
    text_weight: float = field(default=DEFAULT_WEIGHTS["text_loss"], metadata={"help": "of next-token cross-entropy"})
    answer_weight: float = field(
        default=DEFAULT_WEIGHTS["answer_loss"],
        metadata={"help": "of the cross-entropy of the answers alone, which many codes dilute in `text_loss`"},
    )
    seg_bce_weight: float = field(default=DEFAULT_WEIGHTS["seg_bce_loss"], metadata={"help": "of the masks' BCE"})
    seg_dice_weight: float = field(default=DEFAULT_WEIGHTS["seg_dice_loss"], metadata={"help": "of the masks' Dice"})
    seg_object_weight: float = field(
        default=DEFAULT_WEIGHTS["seg_object_loss"], metadata={"help": "of telling whether the thing is there"}
    )
    seg_iou_weight: float = field(
        default=DEFAULT_WEIGHTS["seg_iou_loss"], metadata={"help": "of the IoU that SAM2 predicts for its masks"}
    )
    seg_place_weight: float = field(
        default=DEFAULT_WEIGHTS["seg_place_loss"],
        metadata={
            "help": "of [SEG] being like the picture's tokens within the mask; for a language model that is new"
        },
    )
    depth_marker_weight: float = field(
        default=DEFAULT_WEIGHTS["depth_marker_loss"], metadata={"help": "of the two ends of the depth span"}
    )
    depth_token_weight: float = field(
        default=DEFAULT_WEIGHTS["depth_token_loss"], metadata={"help": "of the codes among each other"}
    )
    depth_count_weight: float = field(
        default=DEFAULT_WEIGHTS["depth_count_loss"], metadata={"help": "of codes too few or too many"}
    )
    depth_recon_weight: float = field(
        default=DEFAULT_WEIGHTS["depth_recon_loss"], metadata={"help": "of the decoded depth map"}
    )
    code_noise: float = field(
        default=0.0,
        metadata={"help": "share of the depth codes that are read as random ones, so that the picture tells the next"},
    )
    mask_points: int = field(default=12544, metadata={"help": "points of a mask that are learned; 0: all pixels"})
    max_tiles: int | None = field(default=None, metadata={"help": "tiles of a picture (default: the processor's)"})
    on_error: str = field(default="stop", metadata={"help": "a record that cannot be used: stop, or skip and list it"})
    max_bad_steps: int = field(default=5, metadata={"help": "steps in a row that are not finite before it stops"})
    sam_cache: str | None = field(default=None, metadata={"help": "folder for the features of SAM2's frozen encoder"})
    resume_anyway: bool = field(default=False, metadata={"help": "go on although the recipe has changed"})
    muon: bool = field(
        default=False, metadata={"help": "with `full`: Muon for the matrices of hidden layers, AdamW for the rest"}
    )
    compiled: bool = field(
        default=False,
        metadata={"help": "torch.compile of the language model's layers while training; set `pad_to_multiple_of` too"},
    )
    answer_first: bool = field(default=False, metadata={"help": "perception behind the answer, for comparisons alone"})
    panels: int = field(default=4, metadata={"help": "pictures with their predictions at each evaluation"})
    # Other defaults than TRL's.
    learning_rate: float = field(default=4e-5, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps, or below 1 the share of all steps"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "of the learning rate"})
    max_length: int | None = field(default=None, metadata={"help": "a longer sequence is refused, never cut"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "always false: the collator needs them"})
    hub_strategy: str = field(default="end", metadata={"help": "always end: checkpoints, with pickles, stay here"})
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "sequential keeps the order of the data recipe; batch_rebalance too, but shares the records of a "
            "step out by their lengths, which it measures first"
        },
    )

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        checks = {
            "lora_r": self.lora_r >= 1,
            "lora_dropout": 0 <= self.lora_dropout < 1,
            "code_noise": 0 <= self.code_noise <= 0.5,
            "mask_points": self.mask_points >= 0,
            "max_tiles": self.max_tiles is None or self.max_tiles >= 1,
            "on_error": self.on_error in ("stop", "skip"),
            "max_bad_steps": self.max_bad_steps >= 1,
            "panels": self.panels >= 0,
            "muon": not self.muon or self.full,
            "packing": not self.packing,
            "padding_free": not self.padding_free,
            "remove_unused_columns": not self.remove_unused_columns,
            "loss_type": self.loss_type == "nll",
            "label_smoothing_factor": not self.label_smoothing_factor,
            "hub_strategy": self.hub_strategy == "end",
        }
        checks |= {f"{term.removesuffix('_loss')}_weight": weight >= 0 for term, weight in self.loss_weights.items()}
        if wrong := next((name for name, good in checks.items() if not good), None):
            raise ValueError(f"`{wrong}` is {getattr(self, wrong)!r}, which Perceptio's training has no way to do")
        self.logging_nan_inf_filter = False  # it would hide what went wrong, and change nothing else

    @property
    def loss_weights(self) -> dict[str, float]:
        return {term: getattr(self, f"{term.removesuffix('_loss')}_weight") for term in TERMS}


class PerceptioSFTTrainer(MuonTraining, SafeCheckpoints, GuardedSteps, SFTTrainer):
    """`SFTTrainer` on records: its own loss, exact resuming, and what is trained as Perceptio trains it.

    model: a `PerceptioForConditionalGeneration`, the folder or Hub id of one, or a `PeftModel` of one.
    train_dataset, eval_dataset: `datasets` of records (rows of the data schema); no preparation is needed.
    peft_config: in place of Perceptio's own; with `args.full` none is used.
    depth_model: the depth tokenizer for records without codes; a copy of the model's by default.
    """

    def __init__(
        self,
        model,
        args: PerceptioSFTConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        peft_config=None,
        depth_model: DepthVQVAE | None = None,
        features: FeatureCache | None = None,
        **kwargs,
    ):
        args = args or PerceptioSFTConfig("perceptio-sft")
        model = load_model(model, args) if isinstance(model, (str, Path)) else model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base_name = base.config.name_or_path
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(self.base_name)
        processing_class.check_config(base.config)
        if data_collator is None:
            data_collator = PerceptioCollator(
                processing_class,
                base.config,
                depth_model or depth_tokenizer(base),
                max_length=args.max_length,
                max_tiles=args.max_tiles,
                mask_points=args.mask_points,
                on_error=args.on_error,
                features=features,
                answer_first=args.answer_first,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        peft_config = prepare_training(model, args, peft_config)
        args.ddp_find_unused_parameters = False  # every process has the same graph, whatever its batch holds
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=as_records(train_dataset),
            eval_dataset=_each(eval_dataset, as_records),
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        cast_trained(self.model)
        if args.compiled:
            for layer in base.model.language_model.layers:
                layer.compile()
        self.model_accepts_loss_kwargs = True  # the loss is divided by the counts of the whole step
        self._tallies = {mode: defaultdict(lambda: torch.zeros(2, device=args.device)) for mode in ("train", "eval")}
        self._micro, self.current_sample_ids = 0, []
        plugin = self.args.deepspeed_plugin
        self._encodes_idle = plugin is not None and plugin.zero_stage == 3 and features is None

    def _prepare_for_training(self, *args, **kwargs):
        with ends_in_root(self.model) if is_sharded(self.args) else nullcontext():
            prepared = super()._prepare_for_training(*args, **kwargs)
        seen = [line["num_tokens"] for line in self.state.log_history if "num_tokens" in line]
        self._total_train_tokens = seen[-1] if seen else 0
        return prepared

    def _get_train_sampler(self, train_dataset=None):
        """As in the library, which cannot tell by itself how long a record becomes."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        by_length = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if not by_length or not has_length(dataset):
            return super()._get_train_sampler(dataset)
        lengths = record_lengths(dataset, self.processing_class, self.args.max_tiles)
        sampler = super()._get_train_sampler(Dataset.from_dict({self.args.length_column_name: lengths}))
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.shuffle = False  # the recipe's order is a random one already, and one in which reading is fast
        else:  # the same order in every process, and in a run that goes on
            sampler.generator = torch.Generator().manual_seed(self.args.seed)
        return sampler

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in the library, with the counts of everything that is learned in this optimizer step on all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        self._micro, self.current_sample_ids = 0, [name for batch in batches for name in batch.pop("sample_ids")]
        skipped = [entry for batch in batches for entry in batch.pop("skipped")]
        note_skipped(self.args.output_dir, skipped)
        self._add("train", "skipped_records", torch.tensor([float(len(skipped)), 0.0], device=device))
        self._total_train_tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        counts = sum(
            (batch["targets"]["counts"].to(device) for batch in batches), torch.zeros(len(COUNTS), device=device)
        )
        counts = self.accelerator.reduce(counts, "sum")
        for batch in batches:
            batch["targets"]["own_counts"] = batch["targets"]["counts"]
            batch["targets"]["counts"] = counts
        return batches, counts[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        targets = dict(inputs["targets"], weights=self.args.loss_weights, encode_idle=self._encodes_idle)
        own = targets.pop("own_counts", targets["counts"])
        ids, noise = inputs["input_ids"], self.args.code_noise if mode == "train" else 0.0
        ids = with_code_noise(ids, targets["noisy_positions"], self.accelerator.unwrap_model(model).config, noise)
        output = model(**{**inputs, "input_ids": ids, "targets": targets}, use_cache=False)
        self._note(mode, output, own, targets["counts"])
        # The counts are those of every process, and the processes' gradients are averaged.
        loss = output.loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, output) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs.pop("sample_ids", None)
        inputs.pop("skipped", None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def training_step(self, *args, **kwargs):
        # What is drawn in a step follows from the step alone, so that a run which goes on draws the same.
        place = self.state.global_step * max(self.args.gradient_accumulation_steps, 1) + self._micro
        torch.manual_seed((self.args.seed * SEED_STEP + place) * 4096 + self.accelerator.process_index)
        self._micro += 1
        return super().training_step(*args, **kwargs)

    # Figures

    def _note(self, mode: str, output, own: torch.Tensor, counts: torch.Tensor) -> None:
        """Sums and counts stay on the device until they are asked for."""
        for term, part in output.losses.items():
            kind = COUNTS.index(COUNTED[term])
            self._add(mode, term, torch.stack([part.detach().float() * counts[kind].clamp(min=1), own[kind]]))
        for name, pair in output.figures.items():
            self._add(mode, name, pair)

    def _add(self, mode: str, name: str, pair: torch.Tensor) -> None:
        self._tallies[mode][name] = self._tallies[mode][name] + pair

    def figures(self, mode: str) -> dict[str, float]:
        """Means over all processes since the last call; what nothing was seen of is left out."""
        tally = self._tallies[mode]
        names = sorted(tally)
        if not names:
            return {}
        pairs = self.accelerator.reduce(torch.stack([tally[name] for name in names]), "sum")
        tally.clear()
        found = {}
        for name, (amount, count) in zip(names, pairs.tolist(), strict=True):
            if name == "skipped_records":
                found |= {name: int(amount)} if amount else {}
            elif count:
                found[name] = amount / count
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.figures("train") | {"num_tokens": self._total_train_tokens, "bad_steps": self.bad_steps}
        Trainer.log(self, logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._tallies["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.figures("eval")
        found["loss"] = sum(weight * found.get(term, 0.0) for term, weight in self.args.loss_weights.items())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    @torch.compiler.set_stance("force_eager")  # its batches are none of those that layers were compiled for
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        # Sharded weights cannot be used by one process alone.
        if self.args.panels and isinstance(dataset, Dataset) and not is_sharded(self.args):
            if self.is_world_process_zero():
                count = min(self.args.panels, len(dataset))
                records = (dataset[index * len(dataset) // count] for index in range(count))
                show_panels(self, metric_key_prefix, draw_panels(self, records))
            self.accelerator.wait_for_everyone()
        return metrics

    def _evaluate(self, *args, **kwargs):
        """Data that cannot be read any more costs the evaluation, not the run."""
        try:
            return super()._evaluate(*args, **kwargs)
        except (ValueError, OSError) as error:
            if self.args.world_size > 1 or self.args.load_best_model_at_end:
                raise
            logger.warning("step %d is not evaluated: %s", self.state.global_step, " ".join(str(error).split()))
            self.model.train()
            return {}

    # Saving

    def run_facts(self) -> dict:
        """What decides the curve: a run may only go on with the same."""
        config = self.accelerator.unwrap_model(self.model).config
        names = [
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "lr_scheduler_type",
            "optim",
            "max_grad_norm",
            "seed",
        ]
        names += [
            "full",
            "train_vision",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "code_noise",
            "mask_points",
            "max_tiles",
            "answer_first",
            "muon",
        ]
        facts = {name: getattr(self.args, name) for name in names} | self.args.loss_weights
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return {name: str(value) for name, value in facts.items()} | {
            "batch_size": str(batch * self.args.world_size),
            "samples": str(len(self.train_dataset)) if hasattr(self.train_dataset, "__len__") else "a stream",
            "model": self.base_name,
            "codebook": str(config.depth_config.codebook_hash),
            "tokenizer": tokenizer_hash(self.processing_class.tokenizer),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the library, without its pickled arguments; an adapter remembers its base."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            finish_folder(
                output_dir or self.args.output_dir, self.accelerator.unwrap_model(self.model), self.base_name
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """The card is written with the result, by `save_result`."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the library, before training; but a Hub that refuses, or is not reached, stops no run."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            logger.warning(f"nothing can be pushed now ({explain_push(error)}); training starts all the same")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Upload the result, `output_dir/model`, which is written where it is not there yet; returns the commit.

        With `blocking=False` it is a future.  Only the main process uploads; the others have None.
        """
        folder = Path(self.args.output_dir) / MODEL

        def is_missing() -> bool:
            if folder.is_dir() and self.state.global_step not in (0, self.result_step):
                raise ValueError(
                    f"{folder} is not the result of step {self.state.global_step}, where this run is: remove it, or "
                    "name another output folder"
                )
            return not folder.is_dir()

        if self._together(is_missing, self.is_world_process_zero()):
            save_result(self)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        options = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if blocking:
            return push_folder(folder, name, **options)
        return HfApi().run_as_future(push_folder, folder, name, **options)


def parse(arguments: list[str] | None = None) -> tuple[RunArguments, PerceptioSFTConfig]:
    return TrlParser((RunArguments, PerceptioSFTConfig)).parse_args_and_config(arguments)


def open_run(run: RunArguments, config: PerceptioSFTConfig, stack: ExitStack) -> PerceptioSFTTrainer:
    """Everything of a run, opened; what is opened on the way is closed by `stack`."""
    if run.eval_data is None and config.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` is {config.eval_strategy!r} and `eval_data` is missing: name what to evaluate on"
        )
    check_trackers(config.report_to)
    data = stack.enter_context(closing(RunData(run.data, run.split)))
    epochs, per_step = config.num_train_epochs, config.train_batch_size * config.gradient_accumulation_steps
    limit = config.max_steps * per_step * config.world_size if config.max_steps > 0 else run.samples
    train = data.training(epochs, limit)
    config.num_train_epochs = 1.0  # `train` holds all of them, each in its own order
    held_out = None
    if run.eval_data is not None:
        held_out = stack.enter_context(closing(RunData(run.eval_data, run.eval_split))).evaluation(run.eval_samples)
    model = load_model(run.model, config, qlora=run.qlora)
    processor = AutoProcessor.from_pretrained(run.model)
    if config.max_length is not None:
        check_lengths(train, processor, config.max_length, config.max_tiles)
    features = None
    if config.sam_cache is not None:
        sources = [train, *(held_out or {}).values()]
        kind = torch.bfloat16 if config.bf16 else torch.float32
        features = open_cache(config.sam_cache, model, processor, sources, PartialState(), kind)
    trainer = PerceptioSFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        features=features,
    )
    if trainer.is_world_process_zero():
        print(data.mixture.describe())
        print(trainable_table(trainer.model))
    return trainer


def fine_tune(run: RunArguments, config: PerceptioSFTConfig) -> int:
    if run.model.startswith(LAYOUT):
        if not run.dry_run:
            raise ValueError(f"`model` is {run.model}, which has no weights: pass --dry_run, or name a folder")
        print(rehearse_layout(run.model.removeprefix(LAYOUT), config, run.gpu, run.gpus, run.samples))
        return 0
    resume = config.resume_from_checkpoint or run.resume or None
    found = [*checkpoints(config.output_dir), *Path(config.output_dir).glob(MODEL)]
    if found and not (resume or run.dry_run):
        raise ValueError(
            f"{config.output_dir} holds {found[0].name} of an earlier run: pass --resume to go on from it, or name "
            "another output_dir"
        )
    if config.push_to_hub and not (run.merge or config.full):
        check_base_is_public(run.model)
    with ExitStack() as stack:
        trainer = open_run(run, config, stack)
        if run.dry_run:
            print(rehearse(trainer, run.gpu))
            return 0
        before = trainer.evaluate() if trainer.eval_dataset else {}
        trainer.train(resume_from_checkpoint=resume)
        if trainer.interrupted is not None:
            return EXIT_CODES[trainer.interrupted]
        after = trainer.evaluate() if trainer.eval_dataset else {}
        save_result(trainer, merge=run.merge, scores={"before": before, "after": after})
        if config.push_to_hub:
            trainer.push_to_hub()
    return 0


def main(arguments: list[str] | None = None) -> int:
    forgive_encodings()
    try:
        return fine_tune(*parse(arguments))
    except (ValueError, OSError, ImportError, FloatingPointError, NoMemory) as error:
        return refuse(error)


def _each(dataset, change):
    return {name: change(part) for name, part in dataset.items()} if isinstance(dataset, dict) else change(dataset)


if __name__ == "__main__":
    sys.exit(main())
