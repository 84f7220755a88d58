"""perceptio-tiny before its training: a real InternVL, SAM2 and depth tokenizer, small enough for a laptop.

    python -m perceptio.hub.small build/tiny/base --sam build/tiny/sam/model --vision build/tiny/vision-large/model
    python -m perceptio.hub.small build/again --sam checkpoints/perceptio-tiny --vision checkpoints/perceptio-tiny

The second takes the parts of a trained Perceptio.  The language model is new in both.  With `--more-layers 2` the
vision tower gets two layers more, which begin as the identity.  The tokenizer is a byte-level BPE of the rendered
world's own texts, of the class that real InternVL folders have: it writes any text, and the world's in few tokens.
The chat template writes a picture behind the words of its message: every depth code then stands at one distance from
its part of the picture, however long the question is.
"""

import argparse
import json
import sys
from operator import attrgetter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, GotOcr2ImageProcessorPil, Qwen2Tokenizer

from ..cli import refuse
from ..configuration_perceptio import PerceptioConfig
from ..modeling_convolutions import PerceptioMaskModel, PerceptioVisionModel
from ..modeling_depth_vqvae import DepthVQVAE
from ..modeling_perceptio import PerceptioForConditionalGeneration
from ..processing_perceptio import CHAT_TEMPLATE, END_TURN_TOKEN, PerceptioProcessor, add_perception_tokens
from ..world.records import scene_records
from .aligned import start_aligned
from .manifest import write_manifest
from .tiny_text import CHAT_TOKENS
from .untrained import generation_defaults

SHUFFLE = 0.5
MERGED = 1024  # entries of the vocabulary before control tokens
TEXT_SCENES = 1500  # whose texts the merges are learned from
TEXT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
SOLVED_SCENES = 640  # that the projector is solved for on
PARTS_AS_THEY_COME = ("        {%- for part in message['content'] or [] -%}\n", "        {%- endfor -%}\n")  # from, to
WORDS_FIRST = """\
        {%- for part in message['content'] or [] if part['type'] != 'image' -%}
            {{- part['text'] -}}
        {%- endfor -%}
        {%- for part in message['content'] or [] if part['type'] == 'image' -%}
            {{- '\\n<IMG_CONTEXT>' -}}
        {%- endfor -%}
"""


def build_small(
    folder,
    sam,
    vision,
    depth,
    seed: int = 0,
    more_layers: int = 0,
    scenes: int = TEXT_SCENES,
    solved: int = SOLVED_SCENES,
) -> PerceptioForConditionalGeneration:
    """Write the folder.  sam: of a `PerceptioMaskModel`;  vision: of a `PerceptioVisionModel`;  depth: of a
    `DepthVQVAE`; each may be that of a Perceptio, too.  more_layers: that the vision tower gets;  scenes: to
    learn the tokenizer from;  solved: to solve for the projector on."""
    mask_model, depth_model = _part(sam, PerceptioMaskModel, "mask_model"), _part(depth, DepthVQVAE, "depth_model")
    torch.manual_seed(seed)
    tower = deepened(_part(vision, PerceptioVisionModel, "model.vision_tower"), more_layers)
    (tile, _), (patch, _) = tower.config.image_size, tower.config.patch_size
    tokens = int((tile // patch) ** 2 * SHUFFLE**2)
    tokenizer = world_tokenizer(world_texts(scenes))
    ids = add_perception_tokens(tokenizer, depth_model.config.num_codes)
    processor = PerceptioProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": tile, "width": tile},
            crop_to_patches=False,
            max_patches=1,  # it has seen whole pictures alone
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        image_seq_length=tokens,
        chat_template=words_first(),
        sam_image_size=mask_model.config.prompt_encoder_config.image_size,
        num_depth_codes=depth_model.config.num_codes,
        depth_grid_size=depth_model.config.grid_size,
    )
    config = PerceptioConfig(
        vision_config=tower.config,
        text_config=AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **TEXT),
        mask_config=mask_model.config,
        depth_config=depth_model.config,
        image_token_id=processor.image_token_id,
        image_seq_length=tokens,
        downsample_ratio=SHUFFLE,
        tie_word_embeddings=True,
        untrained=True,
        **ids,
    )
    model = PerceptioForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.mask_model.load_state_dict(mask_model.state_dict())
    model.depth_model.load_state_dict(depth_model.state_dict())
    start_aligned(model, processor, solved, seed)
    model.generation_config = generation_defaults(config, tokenizer, answer_tokens=100)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_manifest(folder)
    return model


@torch.no_grad()
def deepened(tower: PerceptioVisionModel, more: int) -> PerceptioVisionModel:
    """The tower with as many layers more, which add nothing to what it sees until they are trained."""
    if more < 0:
        raise ValueError(f"`more_layers` is {more}, expected a number of layers")
    if not more:
        return tower
    before = tower.config.num_hidden_layers
    deep = PerceptioVisionModel(type(tower.config)(**{**tower.config.to_dict(), "num_hidden_layers": before + more}))
    deep.load_state_dict({**deep.state_dict(), **tower.state_dict()})
    for layer in deep.encoder.layer[before:]:
        for last in (layer.attention.projection_layer, layer.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    return deep


def words_first() -> str:
    """The chat template with the parts of a message sorted: its words, then its pictures."""
    begin, end = PARTS_AS_THEY_COME
    before, rest = CHAT_TEMPLATE.split(begin, 1)
    return before + WORDS_FIRST + rest.split(end, 1)[1]


def _part(folder, kind: type, place: str):
    """The model that the folder holds, or what a Perceptio has at that place."""
    path = Path(folder) / "config.json"
    held = json.loads(path.read_text("utf-8"))["model_type"] if path.is_file() else None
    if held == PerceptioConfig.model_type:
        return attrgetter(place)(PerceptioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))
    return kind.from_pretrained(folder, dtype=torch.float32)


def world_texts(scenes: int) -> list[str]:
    """Questions and answers of rendered scenes; small pictures say the same and are drawn in less time."""
    from ..world.records import WorldOptions

    options = WorldOptions(width=96, height=96, turns=8)
    records = (record for index in range(scenes) for record in scene_records(index, seed=1, options=options))
    return [message["content"] for record in records for message in record["messages"]]


def world_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of `texts`, with the tokens of chats and pictures."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=MERGED, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=[tuple(pair.split(" ")) for pair in merges])
    tokenizer.add_special_tokens({"extra_special_tokens": list(CHAT_TOKENS)}, replace_extra_special_tokens=False)
    tokenizer.eos_token = END_TURN_TOKEN
    tokenizer.padding_side = "left"
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--sam", required=True, help="folder of the promptable segmenter, or of a Perceptio")
    parser.add_argument("--vision", required=True, help="folder of the vision tower, or of a Perceptio")
    parser.add_argument("--depth", default="checkpoints/depth-tiny", help="folder of the depth tokenizer")
    parser.add_argument("--more-layers", type=int, default=0, metavar="COUNT", help="for the vision tower")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    places = (options.sam, options.vision, options.depth)
    try:
        model = build_small(options.folder, *places, options.seed, options.more_layers)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(f"wrote {options.folder}: {sum(weight.numel() for weight in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
