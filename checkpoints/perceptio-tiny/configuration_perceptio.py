"""Facts of a Perceptio checkpoint: InternVL's configuration, the mask branch, the depth branch, the control tokens.

Holds nothing about training (that is the trainer's configuration) and no token strings (those are the processor's).
"""

import transformers
from packaging.version import Version
from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig, PreTrainedConfig, Sam2Config

OLDEST, TOO_NEW = Version("5.17.0"), Version("6.0.0.dev0")
if not OLDEST <= Version(transformers.__version__) < TOO_NEW:
    raise ImportError(
        f"perceptio runs on transformers >= {OLDEST} and < 6, found {transformers.__version__}: "
        f'pip install "transformers>={OLDEST},<6"'
    )

TEXT_MODEL_TYPES = ("qwen2", "llama", "qwen3")
# A configuration that asks for more than this is a typing error or an attack, and building it would allocate first.
LARGEST_SIZE, MOST_LAYERS, MOST_STAGES = 10_000_000, 1_000, 8
LAYER_FIELDS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "iou_head_depth")
SIZE_FIELDS = (*LAYER_FIELDS, "hidden_size", "intermediate_size", "image_size", "patch_size", "_dim", "vocab_size")

AUTO_MAP = {
    "AutoConfig": "configuration_perceptio.PerceptioConfig",
    "AutoModel": "modeling_perceptio.PerceptioForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_perceptio.PerceptioForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_perceptio.PerceptioForConditionalGeneration",
    "AutoProcessor": "processing_perceptio.PerceptioProcessor",
}
CUSTOM_PIPELINES = {
    "perceptio": {"impl": "pipeline_perceptio.PerceptioPipeline", "pt": ["AutoModelForImageTextToText"], "tf": []}
}
# Keys which are no field of a configuration but which the library itself reads, writes or passes to every one.
LIBRARY_KEYS = {
    "auto_map", "custom_pipelines", "model_type", "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype",
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
    "quantization_config", "num_labels", "output_attentions", "use_cache", "base_model_tp_plan", "base_model_pp_plan",
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "use_return_dict",
}  # fmt: skip


def _reject_unknown(owner: str, unknown: dict) -> None:
    strange = sorted(key for key in unknown if key not in LIBRARY_KEYS)
    if strange:
        raise ValueError(
            f"{owner} has no field {strange[0]!r} (value {unknown[strange[0]]!r:.80}): remove it, correct its "
            "spelling, or load with the version of perceptio that wrote it"
        )


def _check_count(field: str, value, low: int = 1, high: int = LARGEST_SIZE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{field}` is {value!r}, expected a whole number from {low} to {high}")


def _check_sizes(owner: str, values: dict) -> None:
    """Every size of a sub-configuration is positive and of a magnitude that a machine could hold."""
    for field, value in values.items():
        if isinstance(value, PreTrainedConfig):
            _check_sizes(f"{owner}.{field}", vars(value))
        elif isinstance(value, dict):
            _check_sizes(f"{owner}.{field}", value)
        elif isinstance(field, str) and field.endswith(SIZE_FIELDS):
            high = MOST_LAYERS if field in LAYER_FIELDS else LARGEST_SIZE
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if item is not None:
                    _check_count(f"{owner}.{field}", item, high=high)


def _as_config(field: str, value, known: tuple[str, ...]) -> PreTrainedConfig:
    """A sub-configuration of a type that is known beforehand: a name in the file never chooses the code that runs."""
    if value is None:
        value = {}
    if isinstance(value, PreTrainedConfig):
        found = value
    elif isinstance(value, dict):
        if "auto_map" in value or "_attn_implementation_internal" in value:
            raise ValueError(
                f"`{field}` names code to run (auto_map or _attn_implementation_internal): remove the key"
            )
        _check_sizes(field, value)  # before building: a Qwen2 configuration makes a list as long as its layers
        values = {key: item for key, item in value.items() if key != "model_type"}
        kind = value.get("model_type", known[0])
        if kind not in known:
            raise ValueError(f"`{field}.model_type` is {kind!r}, expected one of {known}")
        found = AutoConfig.for_model(kind, **values)
    else:
        raise ValueError(f"`{field}` is a {type(value).__name__}, expected a dict or a configuration object")
    if found.model_type not in known:
        raise ValueError(f"`{field}` is of type {found.model_type!r}, expected one of {known}")
    return found


class PerceptioDepthConfig(PreTrainedConfig):
    r"""The depth tokenizer: a depth map becomes `grid_size ** 2` ids of a codebook of `num_codes`, and comes back.

    Depth is relative inverse depth in [0, 1], scaled per picture: 1 is its nearest point, 0 its farthest.

    image_size (`int`): side of the square map that is encoded and decoded, a multiple of `grid_size`.
    grid_size (`int`): codes per side; a span holds `grid_size ** 2` of them, row by row from the top left.
    num_codes (`int`): K, the size of the codebook.
    code_dim (`int`): D, the width of a code.
    hidden_size (`int`): width of the encoder and of the decoder.
    num_encoder_layers, num_decoder_layers (`int`): their depths.
    num_attention_heads (`int`): a divisor of `hidden_size`.
    depth_offset (`float`): o, above 0.  Inside, a map v is log(v + o): errors far away, where v is small, count more.
    codebook_hash (`str`, *optional*): content hash of the codebook, checked when weights are loaded.
    """

    model_type = "perceptio_depth"
    base_config_key = "depth_config"

    image_size: int = 320
    grid_size: int = 10
    num_codes: int = 128
    code_dim: int = 16
    hidden_size: int = 192
    num_encoder_layers: int = 3
    num_decoder_layers: int = 4
    num_attention_heads: int = 6
    depth_offset: float = 0.1
    codebook_hash: str | None = None
    initializer_range: float = 0.04

    def __post_init__(self, **kwargs):
        _reject_unknown("PerceptioDepthConfig", kwargs)
        for field in ("image_size", "grid_size", "num_codes", "code_dim", "hidden_size", "num_attention_heads"):
            _check_count(f"depth_config.{field}", getattr(self, field))
        for field in ("num_encoder_layers", "num_decoder_layers"):
            _check_count(f"depth_config.{field}", getattr(self, field), low=0, high=MOST_LAYERS)
        for field, part in (("image_size", "grid_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, field) % getattr(self, part):
                raise ValueError(
                    f"`depth_config.{field}` is {getattr(self, field)}, expected a multiple of `{part}`, which is "
                    f"{getattr(self, part)}: change one"
                )
        if not isinstance(self.depth_offset, (int, float)) or not 1e-4 <= self.depth_offset <= 1e4:
            raise ValueError(f"`depth_config.depth_offset` is {self.depth_offset!r}, expected 0.0001 to 10000")
        super().__post_init__(**kwargs)

    @property
    def span_length(self) -> int:
        """N, the codes of one depth span; its two markers are not counted."""
        return self.grid_size**2


def _check_stages(field: str, counts, widths, high: int) -> None:
    """One number of each of the stages that `widths` are of."""
    if not isinstance(counts, (list, tuple)) or not 1 <= len(counts) <= MOST_STAGES or len(counts) != len(widths):
        raise ValueError(f"`{field}` is {counts!r:.80}, expected a number for each stage, {MOST_STAGES} at most")
    for count in counts:
        _check_count(field, count, high=high)


def first_pixels(vision_config) -> int:
    """Pixels along a side that the first of the convolutions which read patches takes together; each later stage of
    `conv_widths` halves the side of the picture once more."""
    widths = vision_config.conv_widths
    _check_stages("vision_config.conv_widths", widths, widths, LARGEST_SIZE)
    _check_stages("vision_config.conv_depths", getattr(vision_config, "conv_depths", None), widths, MOST_LAYERS)
    side, halved = vision_config.patch_size[0], 2 ** (len(widths) - 1)
    if side % halved:
        raise ValueError(
            f"`vision_config.patch_size` is {side}, expected a multiple of {halved} for {len(widths)} `conv_widths`"
        )
    return side // halved


class PerceptioConfig(InternVLConfig):
    r"""InternVL's configuration (`vision_config`, `text_config`, `image_token_id`, …) with Perceptio's branches.

    mask_config (`Sam2Config` or `dict`, *optional*): the SAM2 that turns the hidden state at `[SEG]` into a mask.
    depth_config (`PerceptioDepthConfig` or `dict`, *optional*): the depth tokenizer.
    seg_token_id (`int`): id of `[SEG]`.
    depth_start_token_id, depth_end_token_id (`int`): ids of the two depth markers.
    depth_code_token_ids (`list[int]`): `[first, count]`, the contiguous ids of the depth codes.
    blocked_token_ids (`list[int]`): ids that are never generated (the picture's markers, the opening of a turn).
    untrained (`bool`): whether the new parts still hold their starting values, as in a freshly assembled folder.

    `tie_word_embeddings` of this configuration decides, not that of `text_config`. Unknown keys raise.
    """

    model_type = "perceptio"
    if hasattr(PreTrainedConfig, "sub_configs_defaults"):
        sub_configs_defaults = {
            **InternVLConfig.sub_configs_defaults,
            "mask_config": Sam2Config,
            "depth_config": PerceptioDepthConfig,
        }
    else:  # before transformers 5.23
        sub_configs = {
            "text_config": AutoConfig,
            "vision_config": InternVLVisionConfig,
            "mask_config": Sam2Config,
            "depth_config": PerceptioDepthConfig,
        }

    mask_config: dict | PreTrainedConfig | None = None
    depth_config: dict | PreTrainedConfig | None = None
    seg_token_id: int | None = None
    depth_start_token_id: int | None = None
    depth_end_token_id: int | None = None
    depth_code_token_ids: list[int] | None = None
    blocked_token_ids: list[int] | None = None
    untrained: bool = False

    def __post_init__(self, **kwargs):
        self.auto_map = self._own_auto_map(kwargs.pop("auto_map", None))
        self.custom_pipelines = kwargs.pop("custom_pipelines", None) or CUSTOM_PIPELINES
        _reject_unknown("PerceptioConfig", kwargs)
        self.vision_config = _as_config("vision_config", self.vision_config, ("internvl_vision",))
        self.text_config = _as_config("text_config", self.text_config, TEXT_MODEL_TYPES)
        self.mask_config = _as_config("mask_config", self.mask_config, ("sam2",))
        if not isinstance(self.depth_config, PreTrainedConfig):  # not by name: as remote code no class is registered
            if not isinstance(self.depth_config, dict | None):
                raise ValueError(f"`depth_config` is {self.depth_config!r:.80}, expected a dict")
            self.depth_config = PerceptioDepthConfig(**(self.depth_config or {}))
        self.blocked_token_ids = list(self.blocked_token_ids or [])
        self._set_default_ids()
        self._check()
        super().__post_init__(**kwargs)

    @staticmethod
    def _own_auto_map(found: dict | None) -> dict:
        foreign = sorted(name for name, target in (found or {}).items() if "--" in str(target) or "/" in str(target))
        if foreign:
            raise ValueError(
                f"`auto_map[{foreign[0]!r}]` is {found[foreign[0]]!r}, which names another repository: a Perceptio "
                "folder carries its own code, so remove the entry"
            )
        return dict(AUTO_MAP)

    def _set_default_ids(self) -> None:
        """Without ids, the control tokens stand at the end of the vocabulary, in the order in which they are added."""
        first = self.text_config.vocab_size - self.depth_config.num_codes - 3
        if self.seg_token_id is None:
            self.seg_token_id = first
        if self.depth_start_token_id is None:
            self.depth_start_token_id = first + 1
        if self.depth_end_token_id is None:
            self.depth_end_token_id = first + 2
        if self.depth_code_token_ids is None:
            self.depth_code_token_ids = [first + 3, self.depth_config.num_codes]

    def _check(self) -> None:
        for name in ("vision_config", "text_config", "mask_config", "depth_config"):
            _check_sizes(name, vars(getattr(self, name)))
        ids = self.depth_code_token_ids
        if not isinstance(ids, (list, tuple)) or len(ids) != 2:
            raise ValueError(f"`depth_code_token_ids` is {ids!r}, expected [first id, number of codes]")
        if ids[1] != self.depth_config.num_codes:
            raise ValueError(
                f"`depth_code_token_ids` counts {ids[1]} codes, but `depth_config.num_codes` is "
                f"{self.depth_config.num_codes}: they belong to different depth tokenizers"
            )
        singles = {
            "seg_token_id": self.seg_token_id,
            "depth_start_token_id": self.depth_start_token_id,
            "depth_end_token_id": self.depth_end_token_id,
        }
        for name, value in {**singles, "depth_code_token_ids": ids[0], "last depth code": ids[0] + ids[1] - 1}.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.text_config.vocab_size:
                raise ValueError(
                    f"`{name}` is {value!r}, outside the vocabulary of {self.text_config.vocab_size}: take the ids "
                    "that `add_perception_tokens` returns and enlarge the embeddings"
                )
        used = [*singles.values(), *range(ids[0], ids[0] + ids[1])]
        if len(set(used)) != len(used) or self.image_token_id in used:
            raise ValueError(
                f"control tokens share an id: {singles}, codes from {ids[0]}, image {self.image_token_id}"
            )
        if getattr(self.vision_config, "conv_widths", None):
            first_pixels(self.vision_config)
        backbone = self.mask_config.vision_config.backbone_config
        if getattr(backbone, "conv_depths", None):
            field = "mask_config.vision_config.backbone_config.conv_depths"
            _check_stages(field, backbone.conv_depths, backbone.embed_dim_per_stage, MOST_LAYERS)
        features = self.vision_config.image_size[0] // self.vision_config.patch_size[0]
        expected = int((features * self.downsample_ratio) ** 2)
        if self.image_seq_length != expected:
            raise ValueError(
                f"`image_seq_length` is {self.image_seq_length}, but vision_config and downsample_ratio make "
                f"{expected} tokens a tile: set it to {expected}"
            )
        prompt, decoder = self.mask_config.prompt_encoder_config, self.mask_config.mask_decoder_config
        if not prompt.hidden_size == decoder.hidden_size == self.mask_config.vision_config.fpn_hidden_size:
            raise ValueError(
                f"`mask_config` joins parts of unequal width: prompt {prompt.hidden_size}, decoder "
                f"{decoder.hidden_size}, features {self.mask_config.vision_config.fpn_hidden_size}"
            )

    @property
    def span_length(self) -> int:
        """N, the codes of one depth span; its two markers are not counted."""
        return self.depth_config.span_length

    @property
    def mask_image_size(self) -> int:
        """Side of the square picture that SAM2 sees."""
        return self.mask_config.prompt_encoder_config.image_size


__all__ = ["PerceptioConfig", "PerceptioDepthConfig"]
