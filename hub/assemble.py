"""`perceptio assemble`: from pretrained parts to an untrained Perceptio folder.

    perceptio assemble --backbone OpenGVLab/InternVL2_5-4B --sam sam2.1_hiera_large.pt --depth vqvae --out perceptio-4b
    perceptio assemble --dry-run --layout 4b

The backbone and SAM2 keep their weights exactly, in whichever of their two layouts they come. The rows of the new
tokens start at the mean of the old rows plus a little noise; the seg projector, and the depth tokenizer where none is
given, start at random. Weights are streamed: the memory needed is that of one shard of the output.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, GotOcr2ImageProcessorPil, InternVLConfig, PreTrainedConfig, Sam2Config
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..configuration_perceptio import PerceptioConfig, PerceptioDepthConfig
from ..files_perceptio import copy_code
from ..modeling_depth_vqvae import DepthVQVAE, codebook_hash
from ..modeling_perceptio import PerceptioForConditionalGeneration, SegProjector
from ..processing_perceptio import PerceptioProcessor, add_perception_tokens
from .backbone_tokenizer import load_tokenizer
from .convert_internvl import EMBEDDING, HEAD, convert_config, is_tied, open_internvl, plan_internvl
from .convert_sam2 import open_sam2, plan_sam2, sam2_config
from .layouts import LAYOUTS, NAMES, internvl_config, internvl_shapes, sam2_shapes
from .manifest import write_manifest
from .weights import Recipe, SafetensorsFolder, Shaped, check_plan, parse_size, shape_of, write_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MARKERS = 3  # [SEG] and the two ends of a depth span; the codes come on top
NOISE = 0.01  # of the old rows' spread: enough to tell the new rows apart, too little to move them from the mean
ANSWER_TOKENS = 512
COLUMNS = 128
# The codebook's hash is of its float32 values, so the depth tokenizer is stored as such whatever the rest is.
KEPT_FLOAT32 = ("depth_model.",)
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PART_PREFIXES = {  # the first that fits
    "vision encoder": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language model": ("model.language_model.", "lm_head."),
    "SAM2 encoder": ("mask_model.vision_encoder.",),
    "SAM2 decoder": ("mask_model.",),
    "seg projector": ("seg_projector.",),
    "depth tokenizer": ("depth_model.",),
}
NEW_ROWS = "new token rows"
PART_ORDER = ("vision encoder", "projector", "language model", NEW_ROWS, *list(PART_PREFIXES)[3:])


@dataclass
class Part:
    """Weights of one origin, with the recipes that turn them into keys of the whole model."""

    name: str
    weights: Mapping[str, Tensor]
    plan: dict[str, Recipe]
    ignored: set[str] = field(default_factory=set)
    prefix: tuple[str, ...] = ()


@dataclass
class Blueprint:
    """A whole model before a weight is written: its configuration, its keys with their shapes, and their origins."""

    config: PerceptioConfig
    shapes: dict[str, tuple[int, ...]]
    parts: list[Part]
    new_rows: int

    def __post_init__(self):
        self.part_of = {key: part for part in self.parts for key in part.plan}

    def make(self, key: str, dtype: torch.dtype) -> Tensor:
        part = self.part_of[key]
        tensor = part.plan[key](part.weights)
        if tuple(tensor.shape) != self.shapes[key]:
            raise ValueError(
                f"{key} would have shape {tuple(tensor.shape)} from the {part.name}, expected {self.shapes[key]}: "
                "weights and configuration belong to different checkpoints"
            )
        return tensor.to(torch.float32 if key.startswith(KEPT_FLOAT32) else dtype)

    def account(self) -> None:
        """Every source key used or ignored by name, every target key made, every shape right. Reads no tensor."""
        for part in self.parts:
            targets = {key for key in self.shapes if key.startswith(part.prefix)}
            check_plan(part.name, part.plan, part.weights, targets, part.ignored)
        sources = [part.weights for part in self.parts]
        try:
            for part in self.parts:
                part.weights = Shaped({key: shape_of(part.weights, key) for key in part.weights})
            for key in self.shapes:
                self.make(key, torch.float32)
        finally:
            for part, weights in zip(self.parts, sources, strict=True):
                part.weights = weights

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of every tensor as it is written."""
        return {
            key: _count(shape) * (4 if key.startswith(KEPT_FLOAT32) else dtype.itemsize)
            for key, shape in self.shapes.items()
        }

    def parameters(self) -> dict[str, int]:
        """Stored numbers per part. The new rows are counted apart from the language model that they extend."""
        counts = dict.fromkeys(PART_ORDER, 0)
        for key, shape in self.shapes.items():
            part = next(name for name, prefixes in PART_PREFIXES.items() if key.startswith(prefixes))
            counts[part] += _count(shape)
            if key in (EMBEDDING, HEAD):
                counts[part] -= self.new_rows * shape[1]
                counts[NEW_ROWS] += self.new_rows * shape[1]
        return counts


class GrowRows:
    """Old rows float[V, D] → rows float[V', D]: those of `old_tokens` stay, the others are drawn around their mean.

    The old table may be longer than its tokenizer: such rows were never trained, count for nothing in the mean, and
    are drawn anew.
    """

    def __init__(self, old_tokens: int, rows: int, seed: int):
        self.old_tokens, self.rows, self.seed = old_tokens, rows, seed

    def __call__(self, old: Tensor) -> Tensor:
        kept = old[: self.old_tokens]
        # Some columns at a time: the whole table in float32 would be the largest thing in memory.
        blocks = [torch.std_mean(block.float(), dim=0, correction=0) for block in kept.split(COLUMNS, dim=1)]
        spread, mean = (torch.cat(part) for part in zip(*blocks, strict=True))
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.rows - self.old_tokens, old.shape[1], generator=generator).to(old.device)
        return torch.cat([kept, (mean + NOISE * spread * noise).to(old.dtype)])


def draw_blueprint(
    backbone: tuple[InternVLConfig, bool, Mapping[str, Tensor]],
    sam: tuple[Sam2Config, Mapping[str, Tensor]],
    depth: tuple[PerceptioDepthConfig, Mapping[str, Tensor]],
    tokens: dict,
    old_tokens: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    tied: bool | None = None,
) -> Blueprint:
    """Join the parts. Raises unless every key is accounted for and every shape fits.

    tokens: ids as `add_perception_tokens` gives them, with `image_token_id`.
    old_tokens: entries of the tokenizer before they were added.
    tied: whether the output rows are the input rows, for where the tensors are not there to tell.
    """
    internvl, original, backbone_weights = backbone
    mask_config, mask_weights = sam
    depth_config, depth_weights = depth
    plan, ignored = plan_internvl(backbone_weights, internvl, original)
    if EMBEDDING not in plan:
        raise ValueError(
            f"the backbone has no input embeddings (nothing becomes {EMBEDDING}): is it an InternVL model?"
        )
    old_rows = shape_of(backbone_weights, plan[EMBEDDING].sources[0])[0]
    if old_tokens > old_rows:
        raise ValueError(
            f"the backbone's tokenizer has {old_tokens} entries, but its embeddings have {old_rows} rows: they belong "
            "to different checkpoints"
        )
    tied = is_tied(plan, backbone_weights) if tied is None else tied
    if tied and HEAD in plan:
        ignored |= set(plan.pop(HEAD).sources)
    last = max(tokens["depth_code_token_ids"][0] + tokens["depth_code_token_ids"][1], tokens["seg_token_id"] + 1)
    rows = max(old_rows, last, tokens["depth_end_token_id"] + 1)
    for offset, key in enumerate(key for key in (EMBEDDING, HEAD) if key in plan):
        plan[key] = Recipe(plan[key].sources, GrowRows(old_tokens, rows, seed + offset))
    config = _join_configs(internvl, mask_config, depth_config, tokens, rows, tied, dtype)
    sam_plan, sam_ignored = plan_sam2(mask_weights)
    projector = _fresh_projector(config, seed)
    parts = [
        Part("backbone", backbone_weights, plan, ignored, ("model.", "lm_head.")),
        Part("SAM2", mask_weights, _prefixed("mask_model.", sam_plan), sam_ignored, ("mask_model.",)),
        Part("depth tokenizer", depth_weights, {f"depth_model.{key}": Recipe((key,)) for key in depth_weights}, set(),
             ("depth_model.",)),
        Part("seg projector", projector, {f"seg_projector.{key}": Recipe((key,)) for key in projector}, set(),
             ("seg_projector.",)),
    ]  # fmt: skip
    blueprint = Blueprint(config, _model_shapes(config), parts, rows - old_rows)
    blueprint.account()
    return blueprint


def _join_configs(
    internvl: InternVLConfig, mask_config: Sam2Config, depth_config: PerceptioDepthConfig, tokens: dict, rows: int,
    tied: bool, dtype: str,
) -> PerceptioConfig:  # fmt: skip
    text = internvl.text_config
    text.vocab_size, text.tie_word_embeddings = rows, tied
    for config in (text, internvl.vision_config, mask_config, depth_config):
        _forget_origin(config)
    config = PerceptioConfig(
        text_config=text,
        vision_config=internvl.vision_config,
        mask_config=mask_config,
        depth_config=depth_config,
        image_seq_length=internvl.image_seq_length,
        downsample_ratio=internvl.downsample_ratio,
        projector_hidden_act=internvl.projector_hidden_act,
        vision_feature_layer=internvl.vision_feature_layer,
        vision_feature_select_strategy=internvl.vision_feature_select_strategy,
        tie_word_embeddings=tied,
        untrained=True,
        **tokens,
    )
    config.architectures = [PerceptioForConditionalGeneration.__name__]
    config.dtype = DTYPES[dtype]
    return config


def _forget_origin(config: PreTrainedConfig) -> None:
    """A part's own dtype and architecture say nothing about the whole."""
    config.dtype = config.architectures = None
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            _forget_origin(value)


def _prefixed(prefix: str, plan: dict[str, Recipe]) -> dict[str, Recipe]:
    return {prefix + key: recipe for key, recipe in plan.items()}


def _model_shapes(config: PerceptioConfig) -> dict[str, tuple[int, ...]]:
    """Every key that a folder of this configuration stores; a tied output matrix is not stored."""
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(config)
    tied = {HEAD} if config.tie_word_embeddings else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def _fresh_projector(config: PerceptioConfig, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(SegProjector(config).state_dict())


def fresh_depth(config: PerceptioDepthConfig, seed: int = 0) -> tuple[PerceptioDepthConfig, dict[str, Tensor]]:
    """A random depth tokenizer, with the hash of its codebook in the configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = dict(DepthVQVAE(config).state_dict())
    config.codebook_hash = codebook_hash(weights["codebook"])
    return config, weights


def open_depth(folder: Path) -> tuple[PerceptioDepthConfig, SafetensorsFolder]:
    """A depth tokenizer as `DepthVQVAE.save_pretrained` writes it; its codebook must be the one that was recorded."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: name a folder that DepthVQVAE.save_pretrained wrote")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") != PerceptioDepthConfig.model_type:
        raise ValueError(
            f"{path} has `model_type` {values.get('model_type')!r}, expected {PerceptioDepthConfig.model_type!r}"
        )
    config, weights = PerceptioDepthConfig.from_dict(values), SafetensorsFolder(folder)
    if "codebook" not in set(weights):
        raise ValueError(f"{folder} has no tensor named codebook, expected the weights of a DepthVQVAE")
    found = codebook_hash(weights["codebook"])
    if config.codebook_hash not in (None, found):
        raise ValueError(
            f"the codebook in {folder} has hash {found}, but its config.json records {config.codebook_hash}: weights "
            "and configuration belong to different depth tokenizers"
        )
    config.codebook_hash = found
    return config, weights


def assemble(
    backbone: str | os.PathLike,
    sam: str | os.PathLike,
    out: str | os.PathLike,
    depth: str | os.PathLike | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    num_codes: int | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    sam_sha256: str | None = None,
    depth_config: PerceptioDepthConfig | None = None,
    progress: Callable[[str], object] | None = None,
) -> Path:
    """Write the untrained folder `out` and return its path.

    backbone: folder or Hub id of an InternVL model, in transformers' layout or the original one.
    sam: folder or Hub id in transformers' layout, or one of Meta's `.pt` files.
    depth: folder of a `DepthVQVAE`; without one a random depth tokenizer is made (of `depth_config`, where given).
    progress: told each key when its tensor is made.

    The folder appears under its name only when it is whole.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}, expected one of {tuple(DTYPES)}")
    parse_size(max_shard_size)
    _check_out(out, overwrite)
    blueprint, processor = _prepare(backbone, sam, depth, dtype, seed, num_codes, sam_sha256, depth_config)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        sizes = blueprint.sizes(DTYPES[dtype])
        write_shards(unfinished, sizes, lambda key: blueprint.make(key, DTYPES[dtype]), max_shard_size, progress)
        blueprint.config.save_pretrained(unfinished)
        _generation_config(blueprint.config, processor.tokenizer).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        copy_code(unfinished)
        (unfinished / "README.md").write_text(_card(blueprint, backbone, sam, depth), encoding="utf-8")
        write_manifest(unfinished)
        os.chmod(unfinished, 0o777 & ~_umask())  # mkdtemp's folders are private
        put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _prepare(backbone, sam, depth, dtype, seed, num_codes, sam_sha256=None, depth_config=None):
    """(blueprint, processor) of the named parts; nothing is written."""
    backbone_folder = resolve(backbone, "--backbone")
    opened = open_internvl(backbone_folder)
    masks = open_sam2(resolve(sam, "--sam"), sha256=sam_sha256)
    if depth is not None:
        depths = open_depth(resolve(depth, "--depth"))
        if num_codes not in (None, depths[0].num_codes):
            raise ValueError(
                f"`num_codes` is {num_codes}, but the codebook in {depth} has {depths[0].num_codes}: leave it out"
            )
    else:
        depths = fresh_depth(
            depth_config or PerceptioDepthConfig(**({"num_codes": num_codes} if num_codes else {})), seed
        )
    tokenizer = load_tokenizer(backbone_folder)
    old_tokens = max(tokenizer.get_vocab().values()) + 1
    tokens = add_perception_tokens(tokenizer, num_codes=depths[0].num_codes)
    processor = _build_processor(tokenizer, opened[0], masks[0], depths[0])
    tokens = {**tokens, "image_token_id": processor.image_token_id}
    old_tokens = min(old_tokens, tokens["seg_token_id"])  # a tokenizer that has them already
    blueprint = draw_blueprint(opened, masks, depths, tokens, old_tokens, seed, dtype)
    return blueprint, processor.check_config(blueprint.config)


def _build_processor(tokenizer, internvl: InternVLConfig, masks: Sam2Config, depth: PerceptioDepthConfig):
    side = internvl.vision_config.image_size[0]
    # Every InternVL sees pictures with ImageNet's statistics, whatever the folder's preprocessor file is called.
    pictures = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD
    )
    return PerceptioProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        image_seq_length=internvl.image_seq_length,
        sam_image_size=masks.prompt_encoder_config.image_size,
        num_depth_codes=depth.num_codes,
        depth_grid_size=depth.grid_size,
    )


def resolve(name: str | os.PathLike, argument: str) -> Path:
    """A local file or folder as it is; anything shaped like owner/name from the Hub, only files that are no code."""
    path = Path(name)
    if path.exists():
        return path
    if (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and path.suffix != ".pt"
    ):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=WANTED_FILES))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`{argument}` is {name!r}, which is no local folder and could not be fetched from the Hub ({error})"
            ) from error
    raise ValueError(
        f"`{argument}` is {str(name)!r}, which does not exist: name a folder, a file or a Hub id (owner/name)"
    )


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"`--out` is {str(out)!r}, which exists: choose another name or pass --overwrite")
    if not _is_perceptio(out):
        raise ValueError(
            f"`--out` is {str(out)!r}, which holds no Perceptio model: only such a folder is ever overwritten"
        )


def _is_perceptio(folder: Path) -> bool:
    try:
        return (
            json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
            == PerceptioConfig.model_type
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def put_in_place(unfinished: Path, out: Path) -> None:
    """Rename a finished folder to `out`; one that is there is moved aside first, and back if that fails."""
    if not out.exists():
        os.rename(unfinished, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, aside / out.name)
    try:
        os.rename(unfinished, out)
    except OSError:
        os.rename(aside / out.name, out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _generation_config(config: PerceptioConfig, tokenizer) -> GenerationConfig:
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id} - {None, tokenizer.unk_token_id}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=config.span_length + 2 + ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )


def _card(blueprint: Blueprint, backbone, sam, depth) -> str:
    origin = "random: it must be replaced by a trained one" if depth is None else f"`{_name(depth)}`"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [perceptio]
---
# An untrained Perceptio

Put together from pretrained parts by `perceptio assemble`. **It is not trained**: the seg projector is random, the
rows of the new tokens are the mean of the old ones, and the language model has never written a `[SEG]` or a depth
span. Its masks and depth maps mean nothing until it is trained.

- backbone: `{_name(backbone)}`
- SAM2: `{_name(sam)}`
- depth tokenizer: {origin}
- codebook hash: `{blueprint.config.depth_config.codebook_hash}`

Depth is relative inverse depth in [0, 1], normalised per picture: larger is nearer.

```
{format_table(blueprint)}
```
"""


def _name(source) -> str:
    """A Hub id in full, of a local path the last part only: a card tells nothing about somebody's disk."""
    text = str(source)
    return text if not Path(text).exists() and text.count("/") == 1 else Path(text).resolve().name


def layout_blueprint(layout: str, variant: str = "large", num_codes: int | None = None) -> Blueprint:
    """The blueprint of a published size, in the original layouts, without a file: tensors on the meta device."""
    values = internvl_config(layout)
    depth_config = PerceptioDepthConfig(**({"num_codes": num_codes} if num_codes else {}))
    with torch.device("meta"):
        depth = dict(DepthVQVAE(depth_config).state_dict())
    old = values["llm_config"]["vocab_size"]
    tokens = {
        "image_token_id": old - 1,
        "seg_token_id": old,
        "depth_start_token_id": old + 1,
        "depth_end_token_id": old + 2,
        "depth_code_token_ids": [old + MARKERS, depth_config.num_codes],
    }
    backbone = (convert_config(values), True, Shaped(internvl_shapes(values)))
    sam = (sam2_config(variant), Shaped(sam2_shapes(variant)))
    return draw_blueprint(backbone, sam, (depth_config, depth), tokens, old, tied=False)


def format_table(blueprint: Blueprint) -> str:
    """Parameters per part, and what they take in bfloat16 and float32."""
    counts = blueprint.parameters()
    lines = [f"{'part':<18}{'parameters':>16}{'bf16 GiB':>11}{'fp32 GiB':>11}"]
    for name, count in [*counts.items(), ("total", sum(counts.values()))]:
        lines.append(f"{name:<18}{count:>16,}{count * 2 / 2**30:>11.3f}{count * 4 / 2**30:>11.3f}")
    return "\n".join(lines)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "assemble",
        help="build an untrained model folder from pretrained parts",
        description="Join an InternVL backbone, a SAM2 and a depth tokenizer into one untrained Perceptio folder. "
        "Pretrained weights stay exactly as they are; every key is accounted for, or nothing is written.",
        epilog="example: perceptio assemble --backbone OpenGVLab/InternVL2_5-4B --sam sam2.1_hiera_large.pt "
        "--depth vqvae --out perceptio-4b.  Without any file: perceptio assemble --dry-run --layout 4b",
    )
    parser.add_argument("--backbone", metavar="DIR_OR_ID", help="InternVL, transformers' layout or the original one")
    parser.add_argument(
        "--sam", metavar="DIR_OR_FILE", help="SAM2.1: folder or Hub id (transformers), or Meta's .pt file"
    )
    parser.add_argument("--sam-sha256", metavar="HASH", help="refuse the .pt file unless it has this SHA-256")
    parser.add_argument(
        "--depth", metavar="DIR", help="folder of a trained DepthVQVAE (default: a random one, said so)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write; it appears only when it is whole")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--num-codes", type=int, help="size of a random codebook (default: 128)")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weight file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing Perceptio folder")
    parser.add_argument("--dry-run", action="store_true", help="account for every key and print sizes, write nothing")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="with --dry-run: a published size, no files needed")
    parser.set_defaults(run=run)


def run(args) -> int:
    """The command. 0 when all is well, 2 and one line on standard error when the input is not usable."""
    try:
        return _dry_run(args) if args.dry_run else _build(args)
    except (ValueError, OSError) as error:
        print(f"perceptio assemble: {error}", file=sys.stderr)
        return 2


def _build(args) -> int:
    missing = [f"--{name}" for name in ("backbone", "sam", "out") if getattr(args, name) is None]
    if missing or args.layout:
        raise ValueError(
            f"{', '.join(missing)} not given" if missing else "--layout is for --dry-run: name files instead"
        )
    from tqdm.auto import tqdm

    with tqdm(unit=" tensors", desc="writing", disable=None) as bar:
        out = assemble(
            args.backbone, args.sam, args.out, args.depth, args.dtype, args.seed, args.num_codes, args.max_shard_size,
            args.overwrite, args.sam_sha256, progress=lambda key: bar.update(),
        )  # fmt: skip
    print(f"{out}: an untrained Perceptio. Its masks and depth maps mean nothing until it is trained.")
    if args.depth is None:
        print("No --depth was given: the depth tokenizer is random too and must be replaced by a trained one.")
    return 0


def _dry_run(args) -> int:
    if args.backbone or args.sam:
        if not (args.backbone and args.sam) or args.layout:
            raise ValueError("a dry run takes --layout, or both --backbone and --sam")
        blueprint, _ = _prepare(
            args.backbone, args.sam, args.depth, args.dtype, args.seed, args.num_codes, args.sam_sha256
        )
        _report(f"{_name(args.backbone)} with {_name(args.sam)}", blueprint)
        return 0
    for layout in [args.layout] if args.layout else LAYOUTS:
        _report(f"{NAMES[layout]} with SAM2.1 large", layout_blueprint(layout, num_codes=args.num_codes))
    return 0


def _report(title: str, blueprint: Blueprint) -> None:
    sources = sum(len(part.weights) for part in blueprint.parts)
    ignored = sum(len(part.ignored) for part in blueprint.parts)
    print(
        f"{title}: {sources} source tensors, {ignored} of them not needed, make {len(blueprint.shapes)} tensors; "
        "none is left over, none is missing"
    )
    print(format_table(blueprint) + "\n")
