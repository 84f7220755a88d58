"""What a fine-tuning run costs, before anybody pays for it: parameters, memory of a GPU, operations, hours.

    config = PerceptioConfig.from_pretrained("perceptio-8b")
    print(report(config, RunFacts(samples=1_000_000, gpu="H100")))

Nothing is loaded or allocated: the model is built on the meta device, where shapes cost nothing.  Everything that the
installed libraries can tell (parameters, the operations of the encoders, what the mask decoder keeps for its gradient)
is counted there; the language model follows formulas, which the tests hold against a real small model.
"""

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_perceptio import PerceptioConfig
from ..losses_perceptio import LOGIT_BYTES
from ..modeling_perceptio import PerceptioForConditionalGeneration

# Peak TFLOP/s of dense bfloat16 products with float32 sums, and GiB of memory, from the makers' data sheets.
GPUS = {
    "A10": (125, 24), "A6000": (155, 48), "A100-40GB": (312, 40), "A100-80GB": (312, 80), "B200": (2250, 180),
    "H100": (989, 80), "H200": (989, 141), "L4": (121, 24), "L40S": (362, 48), "RTX3090": (71, 24),
    "RTX4090": (165, 24),
}  # fmt: skip
SHARDINGS = ("none", "fsdp2", "zero3")
PRECISIONS = ("bf16", "fp16", "fp32")
# The first that fits a parameter's name.
PARTS = {
    "embeddings and head": ("model.language_model.embed_tokens.", "lm_head."),
    "language model": ("model.language_model.",),
    "vision tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "seg projector": ("seg_projector.",),
    "mask decoder": ("mask_model.mask_decoder.",),
    "SAM2 encoders": ("mask_model.",),
    "depth tokenizer": ("depth_model.",),
}
SMALL_PARTS = ("projector", "seg projector", "mask decoder")  # trained whole beside LoRA
FULL_PARTS = ("embeddings and head", "language model", *SMALL_PARTS)
FP32 = 4
# 4-bit weights come in blocks of 64 with one float32 scale each, as bitsandbytes packs them.
BYTES_4BIT = 0.5 + FP32 / 64
# The context of the driver, the buffers of the collectives and what the allocator cannot use: no formula knows them.
OVERHEAD = 2 << 30
ZERO3_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered at one time, its `stage3_max_live_parameters`
GIB = 2**30


@dataclass(frozen=True)
class RunFacts:
    """What is to be run, and on what.

    batch_size: samples per GPU at one time;  accumulation: such batches per optimizer step.
    steps or samples: the length of the run; samples are rounded up to whole steps.
    lora_r: rank of LoRA, None trains everything but SAM2's encoders and the depth tokenizer;  train_vision: also the
        vision tower, which needs `lora_r=None`.
    base_4bit: the linear layers of the language model are 4-bit;  sam_cached: SAM2's features are read from a disk.
    tiles, text_tokens, answer_tokens: of an average sample, the thumbnail counted, the depth span not; the answer is
        part of the text, the only part that is learned.
    mask_share, depth_share: of the samples;  masks: of a sample that has any.
    max_tiles, max_text_tokens: of the largest sample, which memory must hold.
    utilisation: reached share of the GPU's peak.
    """

    world_size: int = 8
    batch_size: int = 2
    accumulation: int = 4
    steps: int | None = None
    samples: int | None = None
    lora_r: int | None = 128
    train_vision: bool = False
    precision: str = "bf16"
    checkpointing: bool = True
    sharding: str = "none"
    base_4bit: bool = False
    sam_cached: bool = False
    tiles: float = 6.0
    text_tokens: float = 250.0
    answer_tokens: float = 100.0
    mask_share: float = 0.3
    depth_share: float = 0.1
    masks: float = 1.5
    max_tiles: int = 13
    max_text_tokens: int = 1024
    gpu: str = "A100-80GB"
    utilisation: float = 0.35

    def __post_init__(self):
        for field in fields(self):
            if field.type in (int, float, int | None):
                self._check_number(field.name, field.type)
        for name, known in (("gpu", tuple(GPUS)), ("sharding", SHARDINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {known}")
        if (self.steps is None) == (self.samples is None):
            raise ValueError(
                f"`steps` is {self.steps} and `samples` is {self.samples}, expected one of them: give one"
            )
        if self.answer_tokens > self.text_tokens:
            raise ValueError(
                f"`answer_tokens` is {self.answer_tokens}, expected at most `text_tokens` ({self.text_tokens}), of "
                "which they are part: change one"
            )
        if self.lora_r is None and self.base_4bit:
            raise ValueError("`base_4bit` is set without `lora_r`, but 4-bit weights take no gradient: give a rank")
        if self.lora_r is not None and self.train_vision:
            raise ValueError("`train_vision` is set with `lora_r`, but an adapter leaves the tower frozen: drop one")

    def _check_number(self, name: str, kind) -> None:
        value = getattr(self, name)
        if value is None and kind == int | None:
            return
        shares = ("mask_share", "depth_share", "utilisation")
        low = 0 if kind is float or name.startswith("max_") else 1
        high = 1 if name in shares else 10**12
        right = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not right or not low <= value <= high or (name == "utilisation" and not value):
            asked = "a number" if kind is float else "a whole number"
            raise ValueError(f"`{name}` is {value!r}, expected {asked} from {low} to {high}: correct it")

    @property
    def step_samples(self) -> int:
        return self.world_size * self.batch_size * self.accumulation

    @property
    def run_steps(self) -> int:
        return self.steps if self.steps is not None else -(-self.samples // self.step_samples)


@dataclass(frozen=True)
class Count:
    total: int
    trained: int


@dataclass(frozen=True)
class Estimate:
    """parameters: by part.  tokens: of an average sample by kind, and of the largest.  memory: bytes of one GPU by
    item.  flops: operations of one average sample by part; `hours` and `gpu_hours` are of the whole run."""

    facts: RunFacts
    parameters: dict[str, Count]
    tokens: dict[str, float]
    memory: dict[str, float]
    flops: dict[str, float]
    gpu_hours: float

    @property
    def hours(self) -> float:
        return self.gpu_hours / self.facts.world_size


def estimate(config: PerceptioConfig, facts: RunFacts) -> Estimate:
    model = meta_model(config, facts)
    flops = flops_per_sample(model, facts)
    return Estimate(
        facts=facts,
        parameters=count_parameters(model, facts),
        tokens=count_tokens(config, facts),
        memory=memory_per_gpu(model, facts),
        flops=flops,
        gpu_hours=gpu_hours(sum(flops.values()), facts),
    )


def meta_model(config: PerceptioConfig, facts: RunFacts) -> PerceptioForConditionalGeneration:
    """The model without weights, in the type in which it computes."""
    with torch.device("meta"):
        return PerceptioForConditionalGeneration(config).to(_compute_type(facts))


def _compute_type(facts: RunFacts) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[facts.precision]


# Parameters


def count_parameters(model: nn.Module, facts: RunFacts) -> dict[str, Count]:
    """By part; a matrix that is tied to another counts once."""
    totals = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += parameter.numel()
    full = FULL_PARTS + (("vision tower",) if facts.train_vision else ())
    trained = SMALL_PARTS if facts.lora_r else full
    counts = {part: Count(total, total if part in trained else 0) for part, total in totals.items()}
    if facts.lora_r:
        counts["LoRA"] = Count(*[facts.lora_r * _lora_width(model)] * 2)
        counts["new token rows"] = Count(*[_new_rows(model.config)] * 2)
    return counts


def part_of(name: str) -> str:
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))


def language_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that LoRA sits on."""
    return [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]


def _lora_width(model: nn.Module) -> int:
    """Parameters of a LoRA of rank one."""
    return sum(layer.in_features + layer.out_features for layer in language_linears(model))


def _new_rows(config: PerceptioConfig) -> int:
    """Parameters of the control tokens' rows, at both ends unless they are tied."""
    rows = 3 + config.depth_code_token_ids[1]  # [SEG], two markers, the codes
    return rows * config.text_config.hidden_size * (1 if config.tie_word_embeddings else 2)


# Tokens


def count_tokens(config: PerceptioConfig, facts: RunFacts) -> dict[str, float]:
    """Of an average sample; `learned` are part of the others, `largest` is the longest sample."""
    picture = config.image_seq_length * facts.tiles
    span = facts.depth_share * (config.span_length + 2)
    seg = facts.mask_share * facts.masks
    largest = config.image_seq_length * facts.max_tiles + config.span_length + 2 + facts.masks + facts.max_text_tokens
    return {
        "picture": picture,
        "span": span,
        "seg": seg,
        "text": facts.text_tokens,
        "total": picture + span + seg + facts.text_tokens,
        "learned": span + seg + facts.answer_tokens,
        "largest": largest,
    }


# Memory


def memory_per_gpu(model: nn.Module, facts: RunFacts) -> dict[str, float]:
    """Bytes by item, all of them taken to be there at one moment: a little more than is ever there."""
    return {
        **_state_memory(model, facts),
        **_activation_memory(model, facts),
        "driver, collectives, fragments": OVERHEAD,
    }


def _state_memory(model: nn.Module, facts: RunFacts) -> dict[str, float]:
    counts = count_parameters(model, facts)
    trained = sum(count.trained for count in counts.values())
    compute = _compute_type(facts).itemsize
    parted = 1 if facts.sharding == "none" else facts.world_size
    halved = facts.sharding == "zero3" and compute < FP32  # the float32 copy is the optimizer's
    kept = compute if halved else FP32
    # Frozen weights are loaded in what is computed in, unless they are cut or stand beside trained ones.
    still = FP32 if not halved and (facts.sharding != "none" or facts.lora_r is None) else compute
    packed = sum(layer.weight.numel() for layer in language_linears(model)) if facts.base_4bit else 0
    depth = counts["depth tokenizer"].total
    frozen = sum(count.total - count.trained for count in counts.values()) - packed - depth
    copies = sum(counts[part].total for part in SMALL_PARTS) if facts.lora_r else 0
    # Under autocast each trained float32 matrix also exists as the bfloat16 that is multiplied; FSDP2 gathers that.
    doubled = trained * compute if kept != compute and facts.sharding == "none" else 0
    return {
        "frozen weights": (frozen * still + depth * FP32) / parted + packed * BYTES_4BIT,
        "trained weights": trained * kept / parted,
        "untouched copies that peft keeps": copies * still / parted,
        "bf16 copies of trained weights": doubled,
        "gradients": trained * kept / parted,
        "optimizer (AdamW)": trained * (3 if halved else 2) * FP32 / parted,
        "gathered weights": _gathered(model, facts, packed) * compute,
        "unpacked 4-bit weights": _widest(model) * compute if packed else 0,
    }


def _widest(model: nn.Module) -> int:
    return max(layer.weight.numel() for layer in language_linears(model))


def _gathered(model: nn.Module, facts: RunFacts, packed: int) -> int:
    """Parameters that a GPU holds whole for a while, though they are sharded."""
    total = sum(parameter.numel() for parameter in model.parameters()) - packed
    if facts.sharding == "none":
        return 0
    if facts.sharding == "zero3":
        return min(total, ZERO3_LIVE)
    # FSDP2 wraps the layers, keeps one and the next, and keeps what is in no layer from forward to backward.
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    sizes = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units]
    layers = model.config.text_config.num_hidden_layers
    return total + packed - sum(sizes) + 2 * (max(sizes) - packed // layers)


def _activation_memory(model: nn.Module, facts: RunFacts) -> dict[str, float]:
    config, compute, batch = model.config, _compute_type(facts).itemsize, facts.batch_size
    tiles, tokens = batch * facts.max_tiles, batch * count_tokens(config, facts)["largest"]
    masks = batch * facts.masks if facts.mask_share else 0
    encoded = batch if facts.mask_share and not facts.sam_cached else 0
    return {
        "language model": tokens * language_bytes_per_token(config, facts),
        "projector": tiles * config.image_seq_length * projector_bytes_per_token(config, facts),
        "vision tower": tiles * vision_bytes_per_tile(config, facts),
        "SAM2 encoder": encoded * sam_bytes_per_picture(config, compute),
        "SAM2 features": (batch if facts.mask_share else 0) * _sam_features(config) * compute,
        "mask decoder": masks * mask_bytes(model),
        "fused head": head_bytes(config, facts),
    }


def language_bytes_per_token(config: PerceptioConfig, facts: RunFacts) -> float:
    """What the language model keeps of a token for its gradient; with checkpointing, of one layer but its inputs."""
    text = config.text_config
    layer = _language_layer_bytes(config, facts)
    stream = text.hidden_size * _stream_bytes(facts)
    last_norm = 2 * stream
    # On the way back the widest gradient exists twice, and with LoRA under autocast twice more in float32.
    casts = 2 * FP32 if facts.precision != "fp32" else 0
    passing = text.intermediate_size * (2 * _compute_type(facts).itemsize + casts) if facts.lora_r else 0
    if facts.checkpointing:
        return text.num_hidden_layers * stream + layer + last_norm + passing
    return text.num_hidden_layers * layer + last_norm + passing


def _stream_bytes(facts: RunFacts) -> int:
    """Of a number between the layers: float32 where the embeddings are trained in float32."""
    return FP32 if facts.lora_r is None else _compute_type(facts).itemsize


def _language_layer_bytes(config: PerceptioConfig, facts: RunFacts) -> float:
    """Of a token in one layer, with an attention that keeps no scores (flash or its like)."""
    text, c = config.text_config, _compute_type(facts).itemsize
    width, inner, head = text.hidden_size, text.intermediate_size, _head_size(text)
    queries = text.num_attention_heads * head
    keys = text.num_key_value_heads * head
    normed = 2 * width + (queries + keys if text.model_type == "qwen3" else 0)
    attention = 4 * queries * c + text.num_attention_heads * FP32  # q, k and v (repeated for their groups), output
    gates = 3 * inner * c  # the gate, what it becomes, and what it is multiplied with
    if facts.lora_r:
        # The norms keep float32; each LoRA the mask of its dropout (a byte) and what it multiplies, and its middle.
        inputs = 5 * width + queries + inner
        return normed * FP32 + inputs * (1 + c) + 7 * facts.lora_r * c + attention + gates
    norms = 2 * normed * FP32  # what comes in, and what is multiplied with the trained weight
    # Autocast makes a copy for each of the layers that share a float32 input.
    shared = 2 * width * FP32 if c == FP32 else 5 * width * c
    return norms + shared + (queries + inner) * c + attention + gates


def _head_size(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def projector_bytes_per_token(config: PerceptioConfig, facts: RunFacts) -> float:
    """Of a picture token: the merged features before and after their norm, and twice the language model's width."""
    merged = config.vision_config.hidden_size / config.downsample_ratio**2
    return (2 * merged + 2 * config.text_config.hidden_size) * FP32


def vision_bytes_per_tile(config: PerceptioConfig, facts: RunFacts) -> float:
    """Frozen, a layer on its way through: its attention or its wide middle.  Trained, what all layers keep."""
    vision, c = config.vision_config, _compute_type(facts).itemsize
    places = _vision_places(config)
    passing = max(11 * vision.hidden_size, 4 * vision.hidden_size + 2 * vision.intermediate_size) * c
    if not facts.train_vision:
        return places * passing
    kept = (11 * vision.hidden_size + 2 * vision.intermediate_size) * FP32
    stream = vision.hidden_size * FP32
    layers = vision.num_hidden_layers
    return places * (layers * stream + kept if facts.checkpointing else layers * kept)


def _vision_places(config: PerceptioConfig) -> int:
    vision = config.vision_config
    (height, width), (down, across) = vision.image_size, vision.patch_size
    return (height // down) * (width // across) + 1


def sam_bytes_per_picture(config: PerceptioConfig, compute: int) -> float:
    """The fullest moment of SAM2's encoder, which keeps nothing for a gradient: its finest maps.

    Either a layer of the first stage (what comes in, its norm, the wide middle before and after the activation), or
    the end, where all stages are there, and the finest map is added to its coarser neighbour in float32.
    """
    vision = config.mask_config.vision_config
    backbone = vision.backbone_config
    fine = _finest_side(config) ** 2
    width = backbone.embed_dim_per_stage[0]
    layer = fine * width * (2 + 2 * backbone.mlp_ratio) * compute
    stages = sum(fine * size / 4**i for i, size in enumerate(backbone.embed_dim_per_stage)) * compute
    maps = fine * vision.fpn_hidden_size
    return max(layer, stages + 2 * _sam_features(config) * compute + maps * (FP32 + 2 * compute))


def _finest_side(config: PerceptioConfig) -> int:
    return max(config.mask_config.vision_config.backbone_feature_sizes)[0]


def _sam_features(config: PerceptioConfig) -> int:
    """Numbers of a picture's three maps."""
    vision = config.mask_config.vision_config
    return sum(height * width for height, width in vision.backbone_feature_sizes) * vision.fpn_hidden_size


def mask_bytes(model: nn.Module) -> int:
    """What the mask decoder and the seg projector keep of one mask for their gradient."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _decode_one_mask(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def head_bytes(config: PerceptioConfig, facts: RunFacts) -> float:
    """The loss of the text: some logits at a time and the gradient of the learned states, never all logits."""
    text, compute = config.text_config, _compute_type(facts).itemsize
    learned = facts.batch_size * (facts.max_text_tokens + config.span_length + 2 + facts.masks)
    pieces = LOGIT_BYTES * (1 + 2 * compute / FP32)  # in float32, and before and after that in the computing type
    gradient = text.vocab_size * text.hidden_size * FP32 if facts.lora_r is None else 0
    return pieces + 2 * learned * text.hidden_size * compute + gradient


# Operations


def flops_per_sample(model: nn.Module, facts: RunFacts) -> dict[str, float]:
    """Forward and backward of an average sample.  A product of n × m and m × k counts 2nmk, whatever is masked."""
    config, tokens = model.config, count_tokens(model.config, facts)
    masks, pictures = facts.mask_share * facts.masks, 0 if facts.sam_cached else facts.mask_share
    seg = sum(parameter.numel() for parameter in model.seg_projector.parameters() if parameter.ndim == 2)
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters() if p.ndim == 2)
    passes = 3 + facts.checkpointing if facts.train_vision else 1
    return {
        "language model": _language_flops(model, facts, tokens["total"]),
        "fused head": _head_flops(config, facts, tokens["learned"]),
        "vision tower": passes * facts.tiles * vision_flops(model) if facts.tiles else 0.0,
        "projector": 3 * 2 * projector * tokens["picture"],
        "SAM2 encoder": pictures * sam_flops(model) if pictures else 0.0,
        "mask decoder": masks * (mask_flops(model) + 3 * 2 * seg) if masks else 0.0,
        "depth tokenizer": facts.depth_share * depth_flops(model) if facts.depth_share else 0.0,
    }


def _language_flops(model: nn.Module, facts: RunFacts, tokens: float) -> float:
    text = model.config.text_config
    linear = 2 * tokens * sum(layer.weight.numel() for layer in language_linears(model))
    lora = 2 * tokens * (facts.lora_r or 0) * _lora_width(model)
    scores = 4 * tokens**2 * text.num_attention_heads * _head_size(text) * text.num_hidden_layers
    forward = linear + lora + scores
    # A frozen weight passes its gradient on, and takes none: one product back where a trained one has two.
    backward = (linear if facts.lora_r else 2 * linear) + 2 * lora + 2 * scores
    return forward + backward + (forward if facts.checkpointing else 0)


def _head_flops(config: PerceptioConfig, facts: RunFacts, learned: float) -> float:
    product = 2 * learned * config.text_config.vocab_size * config.text_config.hidden_size
    return product * (2 if facts.lora_r else 3)


def _counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _empty(model: nn.Module, *shape: int) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=model.dtype)


def vision_flops(model: nn.Module) -> int:
    """Forward of one tile."""
    tile = _empty(model, 1, 3, *model.config.vision_config.image_size)
    with torch.no_grad():
        return _counted(lambda: model.model.vision_tower(tile))


def sam_flops(model: nn.Module) -> int:
    """Forward of one picture."""
    side = model.config.mask_image_size
    with torch.no_grad():
        return _counted(lambda: model.encode_pictures(_empty(model, 1, 3, side, side)))


def mask_flops(model: nn.Module) -> int:
    """Forward and backward of one mask, the seg projector not counted."""
    seg = 2 * sum(parameter.numel() for parameter in model.seg_projector.parameters() if parameter.ndim == 2)
    return _counted(lambda: _decode_one_mask(model).sum().backward()) - 3 * seg


def depth_flops(model: nn.Module) -> int:
    """Forward and backward of one map: the gradient passes through the frozen decoder."""
    depth = model.config.depth_config
    latents = torch.empty(1, depth.code_dim, depth.grid_size, depth.grid_size, device="meta", requires_grad=True)
    decoder = model.depth_model.float()
    return _counted(lambda: decoder.decode(latents).sum().backward())


def _decode_one_mask(model: nn.Module) -> Tensor:
    """Everything that one mask's gradient comes from, on the meta device."""
    for part in (model.seg_projector, model.mask_model.mask_decoder):
        part.requires_grad_(True)
    vision = model.config.mask_config.vision_config
    features = [_empty(model, 1, vision.fpn_hidden_size, *size) for size in vision.backbone_feature_sizes]
    state = _empty(model, 1, model.config.text_config.hidden_size).requires_grad_()
    masks = model.decode_masks(state, tuple(features), torch.zeros(1, dtype=torch.long, device="meta"))
    return masks.mask_logits.sum() + masks.mask_scores.sum() + masks.object_scores.sum()


def gpu_hours(sample_flops: float, facts: RunFacts) -> float:
    peak = GPUS[facts.gpu][0] * 1e12 / (2 if facts.precision == "fp32" else 1)  # float32 as TF32
    return sample_flops * facts.step_samples * facts.run_steps / (peak * facts.utilisation) / 3600


# Words


def as_dict(config: PerceptioConfig, facts: RunFacts) -> dict:
    """Everything as plain numbers, for JSON; memory in GiB."""
    found = estimate(config, facts)
    memory = {item: size / GIB for item, size in found.memory.items()}
    return {
        "facts": asdict(facts),
        "parameters": {part: asdict(count) for part, count in found.parameters.items()},
        "tokens": found.tokens,
        "memory_gib": {**memory, "total": sum(memory.values())},
        "flops_per_sample": {**found.flops, "total": sum(found.flops.values())},
        "steps": facts.run_steps,
        "samples": facts.run_steps * facts.step_samples,
        "gpu_hours": found.gpu_hours,
        "hours": found.hours,
    }


def report(config: PerceptioConfig, facts: RunFacts) -> str:
    """The estimate as a text that a person reads, with what it takes for granted."""
    found = estimate(config, facts)
    tables = [_parameter_table(found), _token_line(found), _memory_table(found), _flop_table(found)]
    return "\n\n".join([_title(facts), *tables, _cost(found), _assumptions(facts)])


def _title(facts: RunFacts) -> str:
    what = f"LoRA of rank {facts.lora_r}" if facts.lora_r else "all of the language model"
    base = " on a 4-bit base" if facts.base_4bit else ""
    kept = "" if facts.sharding == "none" else f", sharded by {facts.sharding}"
    return (
        f"An estimate, not a measurement: training {what}{base} in {facts.precision} on {facts.world_size} × "
        f"{facts.gpu}{kept}.\n{facts.run_steps:,} steps of {facts.step_samples} samples ({facts.batch_size} per GPU × "
        f"{facts.accumulation} accumulated × {facts.world_size} GPUs)."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"{name:<34}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _parameter_table(found: Estimate) -> str:
    rows = [(part, f"{count.total:,}", f"{count.trained:,}") for part, count in found.parameters.items()]
    sums = [sum(getattr(count, kind) for count in found.parameters.values()) for kind in ("total", "trained")]
    return _table(("parameters", "all", "trained"), [*rows, ("sum", *(f"{value:,}" for value in sums))])


def _token_line(found: Estimate) -> str:
    tokens = {kind: f"{count:,.0f}" for kind, count in found.tokens.items()}
    return (
        f"Tokens of an average sample: {tokens['total']} ({tokens['picture']} picture, {tokens['span']} depth span, "
        f"{tokens['text']} text), {tokens['learned']} of them learned.\nTokens of the largest: {tokens['largest']}."
    )


def _memory_table(found: Estimate) -> str:
    rows = [(item, f"{size / GIB:.2f}") for item, size in found.memory.items() if size]
    total, room = sum(found.memory.values()) / GIB, GPUS[found.facts.gpu][1]
    verdict = "fits" if total < 0.9 * room else "is tight" if total < room else "does not fit"
    return _table(("memory of one GPU, largest batch", "GiB"), [*rows, ("sum", f"{total:.2f}")]) + (
        f"\nThat {verdict} in the {room} GB of one {found.facts.gpu}."
    )


def _flop_table(found: Estimate) -> str:
    rows = [(part, f"{flops / 1e12:.2f}") for part, flops in found.flops.items() if flops]
    total = ("sum", f"{sum(found.flops.values()) / 1e12:.2f}")
    return _table(("operations of one sample", "TFLOP"), [*rows, total])


def _cost(found: Estimate) -> str:
    return f"The run takes about {found.gpu_hours:,.1f} GPU-hours, {found.hours:,.1f} hours on the clock."


def _assumptions(facts: RunFacts) -> str:
    peak = GPUS[facts.gpu][0]
    lines = [
        f"{facts.utilisation:.0%} of the {peak} TFLOP/s that the data sheet promises for bf16 are reached, reading "
        "data and the network keep up, and nothing is evaluated or saved in between",
        f"an average sample has {facts.tiles:g} tiles and {facts.text_tokens:g} tokens of text; "
        f"{facts.mask_share:.0%} have masks ({facts.masks:g} each), {facts.depth_share:.0%} have depth",
        f"the largest sample has {facts.max_tiles} tiles and {facts.max_text_tokens} tokens of text, and a batch may "
        "hold nothing else",
        "what is trained, its gradients and AdamW's two states are float32, and so are the frozen weights where "
        "weights are sharded or all of the language model is trained; with zero3 and bf16 all weights and gradients "
        "are bf16, and the optimizer holds a float32 copy",
        "the attention keeps no scores (flash or its like), and LoRA has a dropout",
        f"{OVERHEAD / GIB:g} GiB go to the driver, the collectives and fragments",
    ]
    wrapped = (textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines)
    return "\n".join(["Assumed:", *wrapped])
