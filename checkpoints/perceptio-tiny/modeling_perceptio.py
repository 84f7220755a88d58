"""Perceptio: InternVL that writes `[SEG]` and a span of depth codes before its answer.

The hidden state at `[SEG]` prompts a SAM2 mask decoder; the codes index a frozen VQ-VAE codebook, a dense depth map.

B batch, L tokens, T picture tiles, S pictures for SAM2, M masks (flat over the batch), N codes of a span, K codes of
the codebook, D width of the language model, H W pixels, h w the low resolution of mask logits (stride 4).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    InternVLForConditionalGeneration,
    InternVLModel,
    LogitsProcessorList,
)
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .adapters_perceptio import RECORD, check_adapter_report, read_adapter, split_adapter, take_record
from .configuration_perceptio import PerceptioConfig
from .files_perceptio import check_weight_files, copy_code
from .generation_perceptio import GrammarAlone, PerceptionGrammar, SpanGuard, opened_by, parse_span
from .losses_perceptio import (
    DEFAULT_WEIGHTS,
    IGNORED,
    Head,
    answer_words,
    at_least_float32,
    depth_count_loss,
    depth_recon_loss,
    depth_token_loss,
    head_cross_entropy,
    mask_iou,
    sample_points,
    seg_bce_loss,
    seg_dice_loss,
    seg_iou_loss,
    seg_object_loss,
    seg_place_loss,
    total_loss,
)
from .modeling_convolutions import PerceptioMaskModel, use_convolutions
from .modeling_depth_vqvae import DepthVQVAE

# Weight-only quantization is for the language model; masks and depth lose more by it than memory gains.
NEVER_QUANTIZED = ("lm_head", "model.vision_tower", "model.multi_modal_projector", "seg_projector", "mask_model",
                   "depth_model")  # fmt: skip
BRANCHES = {"mask": ("mask_model", "seg_projector"), "depth": ("depth_model",)}
OWN_PARTS = ("seg_projector", "mask_model", "depth_model")


@dataclass
class PerceptioCausalLMOutput(InternVLCausalLMOutputWithPast):
    """InternVL's output, with the names that the installed transformers has for the cache and the pictures, and more.

    loss: float[], next-token cross-entropy when `labels` were given; with `targets`, the weighted sum of all losses.
    logits: float[B, L, V], or the last `logits_to_keep` positions; never made with `targets`.
    last_hidden_state: float[B, L, D], what `[SEG]` is read from.
    losses: with `targets`, each unweighted term: what this batch adds to its mean over `targets["counts"]`.
    figures: with `targets`, (sum, count) of each accuracy of this batch.
    """

    last_hidden_state: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    figures: dict[str, Tensor] | None = None


@dataclass
class MaskOutput(ModelOutput):
    """
    mask_logits: float32[M, h, w] before the sigmoid, stride 4 of the square SAM2 picture.
    mask_scores: float32[M] in [0, 1], the IoU that SAM2 predicts for its mask.
    object_scores: float32[M] in [0, 1], the probability that the thing is there at all.
    """

    mask_logits: Tensor | None = None
    mask_scores: Tensor | None = None
    object_scores: Tensor | None = None


@dataclass
class PerceptioGenerationOutput(ModelOutput):
    """What `perceive` returns.  Masks and depth maps are flat lists with the row of each, never padded.

    sequences: int[B, L], prompts included; `prompt_length` columns belong to the prompt.
    mask_logits, mask_scores, object_scores: see `MaskOutput`; None when no row asked for a mask.
    mask_rows, mask_positions: int[M], row and column in `sequences` of the `[SEG]` that each mask answers.
    depth: float32[R, H, W], relative inverse depth in [0, 1], 1 is the picture's nearest point; None unless asked.
    depth_codes: int[R, N], codes 0 … K-1 in row-major order;  depth_rows: int[R], their rows in `sequences`.
    original_sizes: int[P, 2], (height, width) of the pictures as the processor passed them on.
    """

    sequences: Tensor | None = None
    prompt_length: int | None = None
    mask_logits: Tensor | None = None
    mask_scores: Tensor | None = None
    object_scores: Tensor | None = None
    mask_rows: Tensor | None = None
    mask_positions: Tensor | None = None
    depth: Tensor | None = None
    depth_codes: Tensor | None = None
    depth_rows: Tensor | None = None
    original_sizes: Tensor | None = None


class SegProjector(nn.Module):
    """Hidden state at `[SEG]` float[M, D] → prompt embedding of SAM2 float[M, D_sam]."""

    def __init__(self, config: PerceptioConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.mask_config.prompt_encoder_config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(self.linear_1(states).relu())


class SegStates:
    """Last hidden states of the tokens that were generated (and of the prompt's opening), by absolute column.

    A state is kept for every new token: only the device knows which of them is `[SEG]`, and asking would stop it.
    """

    def __init__(self, prompt_length: int):
        self.prompt_length = self.columns = prompt_length
        self.states: dict[int, Tensor] = {}

    def note(self, input_ids: Tensor) -> None:
        self.columns = max(input_ids.shape[1], self.prompt_length)  # a chunk of the prompt tells its own length only

    def take(self, last_hidden_state: Tensor) -> None:
        start = max(self.columns - last_hidden_state.shape[1], self.prompt_length - 2)
        kept = last_hidden_state[:, start - self.columns :].clone()  # a compiled graph reuses its outputs
        for offset in range(kept.shape[1]):
            self.states[start + offset] = kept[:, offset]

    def at(self, column: int, row: int) -> Tensor:
        if column not in self.states:
            raise ValueError(
                f"the state of the [SEG] at column {column} was not computed: generation was stopped right after "
                "it, or `prefill_chunk_size` cuts the prompt there"
            )
        return self.states[column][row]


class PerceptioModel(InternVLModel):
    """InternVL's body under a name of its own: in files the library renames the weights of its own classes, by a table
    that changes between versions."""

    config_class = PerceptioConfig
    config: PerceptioConfig

    def __init__(self, config: PerceptioConfig):
        super().__init__(config)
        use_convolutions(self.vision_tower)


class PerceptioForConditionalGeneration(InternVLForConditionalGeneration, GenerationMixin):
    """InternVL with a mask branch and a depth branch.

    `generate` works as for any model of the library and obeys the perception grammar; `perceive` also decodes what the
    generated tokens stand for.

    branches: which of "mask" and "depth" to build; `from_pretrained(folder, branches=())` loads the language side
        alone, at the backbone's memory.
    """

    config_class = PerceptioConfig
    config: PerceptioConfig
    # Few weights, and a codebook that is rounded has another hash than the one that the data's codes were made with.
    _keep_in_fp32_modules_strict = ["depth_model"]

    def __init__(self, config: PerceptioConfig, branches: tuple[str, ...] = tuple(BRANCHES)):
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = PerceptioModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        unknown = set(branches) - set(BRANCHES)
        if unknown:
            raise ValueError(f"`branches` holds {sorted(unknown)}, expected some of {list(BRANCHES)}")
        if "mask" in branches:
            self.seg_projector = SegProjector(config)
            self.mask_model = PerceptioMaskModel(config.mask_config)
        if "depth" in branches:
            self.depth_model = DepthVQVAE(config.depth_config).float()
        self.missing_branches = frozenset(BRANCHES) - set(branches)
        absent = [rf"^{part}\." for branch in sorted(self.missing_branches) for part in BRANCHES[branch]]
        self._keys_to_ignore_on_load_unexpected = [*absent, rf"(^|\.){RECORD}$"]
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Freeze what the language loss does not reach; a trainer thaws what it trains."""
        for name in OWN_PARTS:
            if hasattr(self, name):
                getattr(self, name).requires_grad_(False)

    # Loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, allow_missing: bool = False, **kwargs):
        """As in the library, but what the library only reports stops the loading: missing, unexpected or misshapen
        weights, damaged files, a codebook other than the recorded one.  Pickled weights are never read.

        allow_missing: load without the weights that are missing.  A branch that lacks weights then refuses to decode;
            text works.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` is False, but Perceptio never reads pickled weights: convert the file")
        kwargs["use_safetensors"] = True
        wants_report = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)  # refused here, where both shapes are known
        pretrained_model_name_or_path, adapter = split_adapter(pretrained_model_name_or_path, kwargs)
        quantization = kwargs.get("quantization_config")
        if quantization is not None:
            _spare_branches(quantization)
        if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir():
            check_weight_files(pretrained_model_name_or_path, expect_float=quantization is None)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        model._check_report(report, pretrained_model_name_or_path, allow_missing, ignore_mismatched)
        model._check_numbers(pretrained_model_name_or_path)
        if "depth" not in model.missing_branches:
            model.depth_model.check_codebook(pretrained_model_name_or_path)
        if adapter is not None and not model._hf_peft_config_loaded:
            model.load_adapter(**adapter)
        return (model, report) if wants_report else model

    def load_adapter(
        self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict: dict | None = None, **kwargs
    ):
        """As in the library, but an adapter that was trained on another base is refused, before anything changes."""
        label, options = adapter_name or "default", dict(kwargs.get("adapter_kwargs") or {})
        weights = read_adapter(self, peft_model_id, adapter_state_dict, label, options)
        report = super().load_adapter(peft_model_id, label, peft_config, weights, **kwargs)
        check_adapter_report(report, peft_model_id, label)
        return report

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """`PeftModel` hands over an adapter here, with the record of its base among the weights."""
        take_record(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_report(self, report: dict, name, allow_missing: bool, ignore_mismatched: bool) -> None:
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        if unexpected:
            raise ValueError(
                f"{name} holds {len(unexpected)} weights that Perceptio has no place for ({_some(unexpected)}): is it "
                "another model? A backbone becomes a Perceptio folder by `perceptio assemble`"
            )
        if missing and not allow_missing:
            raise ValueError(
                f"{name} lacks {len(missing)} weights ({_some(missing)}), which would be random: fetch the whole "
                "folder, build it with `perceptio assemble`, or pass `allow_missing=True` to use what is there"
            )
        if report["mismatched_keys"] and not ignore_mismatched:
            key, found, expected = sorted(report["mismatched_keys"], key=lambda entry: entry[0])[0]
            raise ValueError(
                f"{name} holds {key} in shape {tuple(found)}, but its config.json asks for {tuple(expected)}: weights "
                "and configuration belong to different models"
            )
        self.missing_branches |= {
            branch for branch, parts in BRANCHES.items() if any(key.startswith(parts) for key in missing)
        }

    def _check_numbers(self, name) -> None:
        """The small parts that are Perceptio's own are finite; the language model shows at its first token."""
        parts = ("seg_projector.", "mask_model.mask_decoder.", "depth_model.")
        for key, weight in self.state_dict(keep_vars=True).items():
            checked = key.startswith(parts) and weight.device.type != "meta" and weight.is_floating_point()
            if checked and not torch.isfinite(weight).all():
                raise ValueError(f"{name} holds NaN or infinite values in {key}: fetch or save the folder again")

    def save_pretrained(self, save_directory, *args, max_shard_size: int | str = "5GB", **kwargs) -> None:
        """As in the library; the folder also gets the code, so that it is a whole Hub repository."""
        if self.missing_branches:
            raise ValueError(
                f"this model has no weights of its {sorted(self.missing_branches)} branch, so the folder would be "
                "half a model: load it whole before saving"
            )
        super().save_pretrained(save_directory, *args, max_shard_size=max_shard_size, **kwargs)
        if Path(save_directory).is_dir():
            copy_code(save_directory, self.config.name_or_path, getattr(self.config, "_commit_hash", None))

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        return_dict: bool | None = None,
        sam_pixel_values: Tensor | None = None,
        original_sizes: Tensor | None = None,
        targets: dict | None = None,
        cache=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PerceptioCausalLMOutput | tuple:
        """The language side alone: what a decoding step needs, at InternVL's cost.  With `targets`, all losses.

        pixel_values: float[T, 3, H, W], all tiles of the batch in the order of their placeholders.
        past_key_values, cache: one thing, by its name before transformers 5.24 and since.
        labels: int[B, L], -100 where nothing is to be learned.
        targets: the masks and depth to be learned, as `perceptio.training.collator` makes them.
        sam_pixel_values, original_sizes: taken, so that all the processor's output can be passed, and not used here.
        """
        if past_key_values is not None and cache is not None:
            raise ValueError("`past_key_values` and `cache` are names of one thing: pass the one of your transformers")
        versioned = {"past_key_values": past_key_values, "cache": cache, "mm_encoder_outputs": mm_encoder_outputs}
        kwargs |= {name: value for name, value in versioned.items() if value is not None}
        idle = 0.0 if targets is None or pixel_values is not None else self._idle_picture()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if targets is not None:
            return self._learn(states, input_ids, labels, targets, idle)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        output = PerceptioCausalLMOutput(loss=loss, logits=logits, **outputs)
        wants_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if wants_dict else output.to_tuple()

    # Training

    def _learn(self, states: Tensor, input_ids: Tensor, labels: Tensor, targets: dict, idle: Tensor | float):
        """All losses of a batch.  What a batch has none of is run on zeros and counts nothing, so that all processes
        do the same things in the same order, whatever they were given.  idle: 0, of a picture that is not there."""
        head = Head.of(self.lm_head)
        sums, figures, predicted = self._text_terms(states, labels, head)
        depth = self._depth_terms(states, labels, predicted, head, targets)
        for terms, found in (depth, self._mask_terms(states, input_ids, targets)):
            sums |= terms
            figures |= found
        loss, parts = total_loss(sums, targets["counts"], targets.get("weights", DEFAULT_WEIGHTS))
        return PerceptioCausalLMOutput(loss=loss + idle, losses=parts, figures=figures)

    def _text_terms(self, states: Tensor, labels: Tensor, head: Head) -> tuple[dict, dict, Tensor]:
        learned, words = labels != IGNORED, answer_words(labels, self.config)
        learned[:, 0] = words[:, 0] = False
        predicted, sums = torch.full_like(labels, IGNORED), []
        for chosen in (words, learned & ~words):
            states_before = states[:, :-1][chosen[:, 1:]]
            total, likeliest = head_cross_entropy(states_before, head, labels[chosen])
            predicted[chosen] = likeliest
            sums.append(total)
        right = ((predicted == labels) | ~words).all(-1) & words.any(-1)
        figures = {
            "token_accuracy": _share(((predicted == labels) & learned).sum(), learned.sum()),
            "answer_accuracy": _share(right.sum(), words.any(-1).sum()),
        }
        return {"text_loss": sum(sums), "answer_loss": sums[0]}, figures, predicted

    def _depth_terms(self, states: Tensor, labels: Tensor, predicted: Tensor, head: Head, targets: dict):
        rows, starts = targets["depth_positions"].unbind(-1)
        (first, codes), n = self.config.depth_code_token_ids, self.config.span_length
        places = torch.arange(n + 2, device=states.device)
        rows, columns = rows[:, None], starts[:, None] + places  # [R, 1], [R, N + 2]: start, codes, end
        gold = labels[rows, columns]
        markers = [self.config.depth_start_token_id, self.config.depth_end_token_id]
        ids = torch.tensor([*range(first, first + codes), markers[1]], device=states.device)
        span = states[rows, columns[:, :-1]]  # [R, N + 1, D], what the codes and the end are told from
        logits = (span @ head.select(ids).to(span.dtype).T).to(at_least_float32(span.dtype))  # [R, N + 1, K + 1]
        around = torch.cat([states[rows[:, 0], starts - 1], span[:, -1]])
        marker, _ = head_cross_entropy(around, head, torch.cat([gold[:, 0], gold[:, -1]]))
        inside, targeted = logits[:, :-1, :-1], gold[:, 1:-1] - first
        sums = {
            "depth_marker_loss": marker,
            "depth_token_loss": depth_token_loss(inside, targeted).sum(),
            "depth_count_loss": depth_count_loss(logits).sum(),
            "depth_recon_loss": self._recon(inside, targets).sum(),
        }
        said = predicted[rows, columns]
        kinds = (said[:, 1:-1] >= first) & (said[:, 1:-1] < first + codes)
        whole = kinds.all(-1) & (said[:, 0] == markers[0]) & (said[:, -1] == markers[1])
        figures = {
            "span_token_accuracy": _share((said == gold).sum(), gold.numel()),
            "code_accuracy": _share((inside.argmax(-1) == targeted).sum(), targeted.numel()),
            "span_validity": _share(whole.sum(), len(rows)),
        }
        return sums, figures

    def _recon(self, logits: Tensor, targets: dict) -> Tensor:
        self._require("depth")
        given = logits if len(logits) else nn.functional.pad(logits, (0, 0, 0, 0, 0, 1))
        decoded = self.depth_model.decode(self.depth_model.soft_merge(given))[: len(logits)]
        return depth_recon_loss(decoded, targets["depth_labels"].to(decoded))

    def _mask_terms(self, states: Tensor, input_ids: Tensor, targets: dict):
        self._require("mask")
        rows, columns = targets["seg_positions"].unbind(-1)
        count, present = len(rows), targets["mask_present"]
        if count:
            features = targets.get("sam_features") or self.encode_pictures(targets["sam_pixel_values"])
            prompts, seen = self._prompts(states[rows, columns]), self._seen(states, input_ids, rows)
            logits, ious, objects = self._candidates(prompts, features, targets["mask_images"])
        else:
            prompts = self._prompts(states[0, :1].detach())
            idle = self._candidates(prompts, self._idle_features(states, targets), [0])
            prompts, logits, ious, objects = (output[:0] for output in (prompts, *idle))
            seen = prompts[:, None].expand(-1, self.config.image_seq_length, -1)
        gold = targets["mask_labels"].to(logits.dtype)  # [M, h, w]
        intersection, union = mask_iou(logits, gold[:, None])
        found = intersection / union.clamp(min=1)  # [M, candidates]
        index, best = torch.arange(count, device=logits.device), ious.argmax(-1)
        chosen, overlap = logits[index, best], found[index, best]
        points, golden = sample_points(
            chosen[present], gold[present], targets["mask_seeds"][present], targets["mask_points"]
        )
        sums = {
            "seg_bce_loss": seg_bce_loss(points, golden).sum(),
            "seg_dice_loss": seg_dice_loss(points, golden).sum(),
            "seg_object_loss": seg_object_loss(objects, present).sum(),
            "seg_iou_loss": seg_iou_loss(ious[present], found[present]).sum(),
            "seg_place_loss": seg_place_loss(prompts, seen, self._shares(gold))[present].sum(),
        }
        figures = {
            "mask_iou": _share(overlap[present].sum(), present.sum()),
            "mask_ciou": _share(intersection[index, best][present].sum(), union[index, best][present].sum()),
            "object_accuracy": _share(((objects > 0) == present).sum(), count),
        }
        return sums, figures

    def _seen(self, states: Tensor, input_ids: Tensor, rows: Tensor) -> Tensor:
        """The states at the tokens of the whole picture, a tile by itself or the last of several, made prompts: of the
        pictures of these rows, float[M, T, D_sam]."""
        own, index = rows.unique(return_inverse=True)
        of_picture = input_ids[own] == self.config.image_token_id
        behind = of_picture.flip(1).cumsum(1).flip(1)  # picture tokens from here on
        whole = of_picture & (behind <= self.config.image_seq_length)
        return self._prompts(states[own][whole]).unflatten(0, (len(own), -1))[index]

    def _shares(self, masks: Tensor) -> Tensor:
        """Of the part of the picture that each of its tokens stands for, how much is in the mask: float[M, T]."""
        side = math.isqrt(self.config.image_seq_length)
        return nn.functional.adaptive_avg_pool2d(masks[:, None], side).flatten(1)

    def _idle_features(self, like: Tensor, targets: dict) -> tuple[Tensor, ...]:
        if targets.get("encode_idle"):  # DeepSpeed gathers the encoder's weights from all processes, layer by layer
            side = self.config.mask_image_size
            return self.encode_pictures(like.new_zeros(1, 3, side, side))
        vision = self.config.mask_config.vision_config
        return tuple(like.new_zeros(1, vision.fpn_hidden_size, *size) for size in vision.backbone_feature_sizes)

    def _idle_picture(self) -> Tensor:
        weight = next(self.model.multi_modal_projector.parameters())
        tile = torch.zeros(1, 3, *self.config.vision_config.image_size, device=weight.device)
        return self.model.get_image_features(tile).pooler_output[:0].sum()

    # Generation

    def generate(self, inputs: Tensor | None = None, *args, sam_pixel_values=None, original_sizes=None, **kwargs):
        """`GenerationMixin.generate` under the perception grammar.  Takes everything that the processor returns; the
        SAM2 picture is not needed for text and costs nothing here."""
        return super().generate(inputs, *args, **kwargs)

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, encoder_input_ids=None, **kwargs):
        processors = super()._get_logits_processor(
            generation_config, input_ids_seq_length=input_ids_seq_length, encoder_input_ids=encoder_input_ids, **kwargs
        )
        if encoder_input_ids is None:
            return processors
        if encoder_input_ids.is_floating_point():  # embeddings: no opening can be read off them, so plain text follows
            encoder_input_ids = encoder_input_ids.new_zeros(len(encoder_input_ids), 0, dtype=torch.long)
        grammar = PerceptionGrammar(self.config, encoder_input_ids, max_length=generation_config.max_length)
        if generation_config.max_length is not None and input_ids_seq_length is not None:
            room = generation_config.max_length - input_ids_seq_length
            if room < grammar.needed():
                raise ValueError(
                    f"`max_new_tokens` leaves room for {room} tokens, but the depth span needs {grammar.needed()} and "
                    f"the answer comes after it: pass at least max_new_tokens={grammar.needed() + 1}, or perception="
                    '"none"'
                )
        if not processors:
            return GrammarAlone([grammar])
        return LogitsProcessorList([grammar, *processors, *([SpanGuard(grammar)] if grammar.needed() else [])])

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds: Tensor | None = None, seg_states: SegStates | None = None, **kwargs
    ):
        """`inputs_embeds` is named because `generate` refuses embeddings unless it is."""
        if seg_states is not None:
            seg_states.note(input_ids)
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        if model_kwargs.get("seg_states") is not None:
            model_kwargs["seg_states"].take(outputs.last_hidden_state)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    @torch.no_grad()
    def perceive(
        self, input_ids: Tensor, sam_pixel_values: Tensor | None = None, original_sizes: Tensor | None = None, **kwargs
    ) -> PerceptioGenerationOutput:
        """Generate, then decode what the sequences ask for.

        input_ids: int[B, L], prompts as the processor writes them: their last tokens decide per row what is perceived.
        sam_pixel_values: float[S, 3, H, W], one picture for each row that opens with `[SEG]`, in order.
        kwargs: the processor's other outputs, and anything that `generate` takes (beams, sampling, a streamer, …).

        The state at `[SEG]` is taken while generating; SAM2 encodes each picture once, and only for a mask.
        """
        opened = [opened_by(row, self.config) for row in input_ids[:, -2:].tolist()]
        seg_rows = [row for row, (seg, _, _) in enumerate(opened) if seg]
        self._check_request(opened, seg_rows, sam_pixel_values)
        states = SegStates(input_ids.shape[1]) if seg_rows else None
        kwargs["return_dict_in_generate"] = True
        generated = self.generate(input_ids=input_ids, seg_states=states, **kwargs)
        output = PerceptioGenerationOutput(
            sequences=generated.sequences, prompt_length=input_ids.shape[1], original_sizes=original_sizes
        )
        copies = generated.sequences.shape[0] // input_ids.shape[0]
        spans = [
            parse_span(row, self.config, start=input_ids.shape[1] - opened[index // copies][2])
            for index, row in enumerate(generated.sequences.tolist())
        ]
        if seg_rows:
            beams, images = getattr(generated, "beam_indices", None), {row: i for i, row in enumerate(seg_rows)}
            self._perceive_masks(output, spans, states, beams, copies, images, sam_pixel_values)
        if any(depth for _, depth, _ in opened):
            self._perceive_depth(output, spans)
        return output

    def _check_request(self, opened: list, seg_rows: list[int], sam_pixel_values: Tensor | None) -> None:
        if seg_rows:
            self._require("mask")
            found = 0 if sam_pixel_values is None else len(sam_pixel_values)
            if found != len(seg_rows):
                raise ValueError(
                    f"{len(seg_rows)} prompts open with [SEG], but `sam_pixel_values` holds {found} pictures: pass on "
                    'everything that the processor returns, or prepare the prompts with perception="depth" or "none"'
                )
            side = self.config.mask_image_size
            if sam_pixel_values.shape[1:] != (3, side, side):
                raise ValueError(
                    f"`sam_pixel_values` has shape {tuple(sam_pixel_values.shape)}, expected [pictures, 3, {side}, "
                    f"{side}]: use the processor of this model"
                )
        if any(depth for _, depth, _ in opened):
            self._require("depth")

    def _require(self, branch: str) -> None:
        if branch in self.missing_branches:
            raise ValueError(
                f"this model was loaded without the weights of its {branch} branch: load a folder that has them, "
                "without `branches` or `allow_missing`, or ask without it"
            )

    def _perceive_masks(self, output, spans, states: SegStates, beams: Tensor | None, copies: int, images: dict,
                        pictures: Tensor) -> None:  # fmt: skip
        found = [(row, column) for row, span in enumerate(spans) for column in span.seg_positions]
        hidden = []
        for row, column in found:
            # A beam may have wandered: the step that read this token read it in the row that the next token came from.
            step = max(column + 1 - output.prompt_length, 0)
            source = row if beams is None else int(beams[row, step])
            hidden.append(states.at(column, source))
        which = [images[row // copies] for row, _ in found]
        masks = self.decode_masks(torch.stack(hidden), self.encode_pictures(pictures), which)
        output.mask_logits, output.mask_scores, output.object_scores = masks.to_tuple()
        output.mask_rows, output.mask_positions = torch.tensor(found).T

    def _perceive_depth(self, output: PerceptioGenerationOutput, spans: list) -> None:
        rows = [row for row, span in enumerate(spans) if span.depth_codes is not None]
        if rows:
            output.depth_codes = torch.tensor([spans[row].depth_codes for row in rows])
            output.depth = self.decode_depth(output.depth_codes)
            output.depth_rows = torch.tensor(rows)

    # Decoding

    def encode_pictures(self, sam_pixel_values: Tensor) -> tuple[Tensor, ...]:
        """SAM2's frozen image encoder, once per picture: float[S, 3, H, W] → maps at strides 4, 8 and 16."""
        encoder = self.mask_model.vision_encoder
        weight = next(encoder.parameters())
        with torch.no_grad():
            return tuple(encoder(sam_pixel_values.to(weight.device, weight.dtype)).fpn_hidden_states)

    def decode_masks(self, states: Tensor, features: tuple[Tensor, ...], images: list[int] | Tensor) -> MaskOutput:
        """One mask for each hidden state.

        states: float[M, D], last hidden states at `[SEG]`.
        features: from `encode_pictures`;  images: int[M], the picture (row of the features) of each state.
        """
        logits, ious, objects = self._candidates(self._prompts(states), features, images)
        best = ious.argmax(-1)
        rows = torch.arange(len(best), device=best.device)
        return MaskOutput(
            mask_logits=logits[rows, best], mask_scores=ious[rows, best], object_scores=objects.sigmoid()
        )

    def _prompts(self, states: Tensor) -> Tensor:
        """Hidden states at [SEG] → prompt embeddings float[M, D_sam], where and in what SAM2's decoder computes."""
        self._require("mask")
        place, like = self.seg_projector.linear_1.weight, self.mask_model.mask_decoder.iou_token.weight
        return self.seg_projector(states.to(place.device, place.dtype)).to(like.device, like.dtype)

    def _candidates(self, prompts: Tensor, features, images) -> tuple[Tensor, Tensor, Tensor]:
        """SAM2's candidates for each prompt embedding: mask logits float[M, C, h, w], their IoUs float[M, C], and the
        logit of the thing being there float[M]."""
        model, decoder = self.mask_model, self.mask_model.mask_decoder
        weight = decoder.iou_token.weight
        images = torch.as_tensor(images, device=weight.device)
        fine, middle, coarse = (maps.to(weight.device, weight.dtype) for maps in features)
        fine, middle = decoder.conv_s0(fine), decoder.conv_s1(middle)
        coarse = coarse + model.no_memory_embedding.view(1, -1, 1, 1).to(coarse)
        sparse, dense = self._empty_prompt(len(prompts), weight)
        logits, ious, _, objects = decoder(
            image_embeddings=coarse[images],
            image_positional_embeddings=model.get_image_wide_positional_embeddings()
            .to(weight)
            .expand(len(prompts), -1, -1, -1),
            sparse_prompt_embeddings=torch.cat([sparse, prompts[:, None, None]], dim=2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[fine[images], middle[images]],
        )  # [M, 1, candidates, h, w], [M, 1, candidates], _, [M, 1, 1]
        kind = at_least_float32(logits.dtype)
        return logits[:, 0].to(kind), ious[:, 0].to(kind), objects[:, 0, 0].to(kind)

    def _empty_prompt(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """SAM2's embeddings of "no point, no box, no mask", to which the state at `[SEG]` is one more token."""
        points = torch.zeros(count, 1, 1, 2, device=like.device, dtype=like.dtype)
        labels = -torch.ones(count, 1, 1, device=like.device, dtype=torch.int32)
        return self.mask_model.prompt_encoder(points, labels, None, None)

    def decode_depth(self, codes: Tensor) -> Tensor:
        """Codes int[R, N] (0 … K-1, row-major) → relative inverse depth float32[R, H, W] in [0, 1], 1 is nearest."""
        self._require("depth")
        return self.depth_model.decode_ids(codes)


def _share(amount: Tensor, count: Tensor | int) -> Tensor:
    """(sum, count), to be added up before they are divided."""
    return torch.stack([amount.detach().float(), torch.as_tensor(count, device=amount.device).float()])


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _spare_branches(quantization) -> None:
    """Add the parts that stay in floating point to a quantization configuration, object or dict."""
    for field in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if isinstance(quantization, dict):
            if field in quantization or field == "modules_to_not_convert":
                quantization[field] = sorted({*(quantization.get(field) or []), *NEVER_QUANTIZED})
        elif hasattr(quantization, field):
            setattr(quantization, field, sorted({*(getattr(quantization, field) or []), *NEVER_QUANTIZED}))


__all__ = ["MaskOutput", "PerceptioCausalLMOutput", "PerceptioForConditionalGeneration", "PerceptioGenerationOutput"]
