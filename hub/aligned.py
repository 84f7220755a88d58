"""Where a small language model begins: with words, codes and pictures in one space, so that few records go a long way.

The codes of the depth span begin as their vectors in the codebook, and each part of a picture as the words for what it
shows: the projector is solved for, in closed form, on rendered scenes.  Attention begins by comparing like with like;
where a picture has as many parts as a map has codes, some of it by looking from each code at its part of the picture.
What the language model makes of a part of a picture begins as a prompt that clicks on it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..modeling_perceptio import PerceptioForConditionalGeneration
from ..processing_perceptio import PerceptioProcessor
from ..teachers.cells import NAMES
from ..teachers.vision import VisionTrainingConfig, draw_cells, sine_positions
from ..world.instances import scene_instances
from ..world.marks import LETTERS
from ..world.shapes import NOUNS
from ..world.surfaces import COLOURS, PATTERNS

WORDS = {"noun": NOUNS, "colour": tuple(COLOURS), "pattern": PATTERNS}
SHARE = {"noun": 1.0, "colour": 1.0, "pattern": 0.5}  # of a word in what a part of the picture begins as
OF_LETTER, OF_CODE, OF_PLACE, OF_ITSELF = 1.5, 0.5, 0.25, 0.3  # the same; and of a code in what it begins as
LIKE, NOISE = 0.7, 0.02
SHARP, FASTEST = 5.0, 10  # how much is made of a distance, by so many of the fastest turns of a rotary embedding
ABOVE = 3.0  # where GELU is almost the identity
ALL_ABOVE = 5.0  # of the language model's last states, whose size is about 1: ReLU is the identity
RIDGE = 0.01
CELLS, AT_ONCE = 2, 8
CLICKED = 10  # of the scenes that the projector is solved for on, one in so many is enough for the prompts


@torch.no_grad()
def start_aligned(
    model: PerceptioForConditionalGeneration, processor: PerceptioProcessor, scenes: int, seed: int = 0
) -> None:
    """Set where the language model and the projectors begin.  scenes: to solve for the projector on."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    width = embeddings.shape[1]
    space = nn.init.orthogonal_(torch.empty(width, width), generator=generator)
    embeddings.normal_(std=width**-0.5, generator=generator)
    first, count = model.config.depth_code_token_ids
    vectors = model.depth_model.codebook - model.depth_model.codebook.mean(0)
    vectors = vectors / vectors.norm(dim=1).mean()
    codes = slice(first, first + count)
    embeddings[codes] = vectors @ space[: vectors.shape[1]] + OF_ITSELF * embeddings[codes]
    layers = model.model.language_model.layers
    for layer in layers:
        _compare_alike(layer.self_attn, model.config.text_config, generator)
    if model.config.image_seq_length == model.config.depth_config.grid_size**2:
        back = _distance(processor)
        views = space.split(layers[0].self_attn.head_dim)  # the first has what codes begin as
        _look_back(layers[0].self_attn, model.config.text_config, views[0], back)
        for layer, view in zip(layers[1:], views, strict=False):
            _look_back(layer.self_attn, model.config.text_config, view, back + 1)
    seen, wanted = _parts_of_pictures(model, processor.tokenizer, space[vectors.shape[1] :], scenes, seed)
    _solve(model.model.multi_modal_projector, seen, wanted)
    _click(model, processor, max(1, scenes // CLICKED), seed)


def _compare_alike(attention: nn.Module, config, generator: torch.Generator) -> None:
    """Queries and keys that look at a state in the same way."""
    size, width = attention.head_dim, config.hidden_size
    shared = config.num_attention_heads // config.num_key_value_heads
    for group in range(config.num_key_value_heads):
        view = nn.init.orthogonal_(torch.empty(size, width), generator=generator)
        heads = [(attention.k_proj, group), *((attention.q_proj, group * shared + head) for head in range(shared))]
        for linear, head in heads:
            noise = torch.randn(size, width, generator=generator)
            linear.weight[head * size : (head + 1) * size] = LIKE * view + NOISE * noise


def _distance(processor: PerceptioProcessor) -> int:
    """Tokens from where a code is told to the part of the picture that it is of; from the code it is one more."""
    ids = _asked(processor, Image.new("RGB", (8, 8)), "Where?")["input_ids"][0].tolist()
    return ids.index(processor.depth_start_token_id) - ids.index(processor.image_token_id)


def _asked(processor: PerceptioProcessor, picture: Image.Image, question: str):
    """The prompt of a question about the picture."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(images=picture, text=[text], return_tensors="pt")


def _look_back(attention: nn.Module, config, view: Tensor, back: int) -> None:
    """The last group of heads looks at the token so far back, whatever it is, and passes on what `view`,
    float[head_dim, D], shows of it."""
    size, shared = attention.head_dim, config.num_attention_heads // config.num_key_value_heads
    turns = config.rope_parameters["rope_theta"] ** -(torch.arange(FASTEST) / (size // 2))
    here, there = torch.zeros(2, 2, size // 2)  # halves that are turned together
    there[0, :FASTEST] = SHARP
    here[:, :FASTEST] = SHARP * torch.stack([(turns * back).cos(), -(turns * back).sin()])
    for linear, heads, places in ((attention.q_proj, shared, here), (attention.k_proj, 1, there)):
        linear.weight[-heads * size :] *= NOISE
        linear.bias[-heads * size :] = places.flatten().repeat(heads)
    attention.v_proj.weight[-size:] = view
    attention.o_proj.weight[:, -shared * size :] = (view.T / config.hidden_size**0.5).repeat(1, shared)


def _parts_of_pictures(model, tokenizer, free: Tensor, scenes: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the projector's first linear layer sees of each picture token, and what it is to become, float[tokens, …].

    free: directions that no code has, float[directions, D]."""
    embeddings, (first, _) = model.get_input_embeddings().weight, model.config.depth_code_token_ids
    (side, _), (patch, _) = model.config.vision_config.image_size, model.config.vision_config.patch_size
    args = VisionTrainingConfig("unused", side=side, scene_side=side, patch=patch, cells=CELLS)
    nothing = torch.zeros_like(embeddings[0])
    words = {
        name: torch.stack([nothing, *(embeddings[_token(tokenizer, f" {word}")] for word in known)])
        for name, known in WORDS.items()
    }
    letters = [embeddings[_token(tokenizer, letter)] for letter in LETTERS]
    words["point"] = torch.stack([nothing, *letters])
    grid = int(model.config.image_seq_length**0.5)
    places = OF_PLACE * sine_positions(grid, 64) @ free[:64]
    projector, caught = model.model.multi_modal_projector, []
    hook = projector.linear_1.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].flatten(0, -2)))
    wanted = []
    for start in range(0, scenes, AT_ONCE):
        drawn = []
        for index in range(start, min(start + AT_ONCE, scenes)):
            scene = scene_instances(index, seed, side=side)
            scene = {name: torch.from_numpy(array) for name, array in scene.items()}
            drawn.append(draw_cells(scene, args, np.random.default_rng([seed, index]), whole=True))
        cells = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        model.model.get_image_features(cells["pixel_values"])
        codes = embeddings[first + _codes(model.depth_model, cells["depth"])]  # [B, g, g, D]
        wanted.append((_average_words(cells, words, grid) + OF_CODE * _shrink(codes, grid)).flatten(1, 2) + places)
    hook.remove()
    return torch.cat(caught), torch.cat(wanted).flatten(0, 1)


def _token(tokenizer, text: str) -> int:
    return tokenizer.encode(text, add_special_tokens=False)[0]


def _codes(depth_model, depth: Tensor) -> Tensor:
    """The codes of maps as the tower's cells have them, log depth float[B, C, C], as int[B, g, g]."""
    side, grid, offset = (getattr(depth_model.config, name) for name in ("image_size", "grid_size", "depth_offset"))
    maps = F.interpolate(depth.exp()[:, None] - offset, (side, side), mode="bilinear")[:, 0]
    return depth_model.encode(maps.clamp(0, 1)).flatten(1).unflatten(1, (grid, grid))


def _average_words(cells: dict[str, Tensor], words: dict[str, Tensor], grid: int) -> Tensor:
    """float[B, grid, grid, D]: the words for the things that show in a part of the picture, and the letter in it."""
    shown = (cells["noun"] > 0).float()[..., None]
    named = sum(SHARE[name] * words[name][cells[name]] for name in NAMES)
    per_part = (shown.shape[1] // grid) ** 2
    return _shrink(named, grid) / _shrink(shown, grid).clamp(min=1 / 3) + OF_LETTER * per_part * _shrink(
        words["point"][cells["point"]], grid
    )


def _shrink(maps: Tensor, side: int) -> Tensor:
    """float[B, h, w, D] → float[B, side, side, D], means over areas."""
    return F.interpolate(maps.permute(0, 3, 1, 2), (side, side), mode="area").permute(0, 2, 3, 1)


def _click(model, processor: PerceptioProcessor, scenes: int, seed: int) -> None:
    """Set the projector of prompts so that the state of a part of a picture is SAM2's prompt for a click there."""
    side, states = model.config.mask_image_size, []
    for index in range(scenes):
        image = scene_instances(index, seed, side=model.config.vision_config.image_size[0])["image"]
        inputs = _asked(processor, Image.fromarray(image), f"Where is the {NOUNS[index % len(NOUNS)]}?")
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        found = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
        states.append(found[ids == model.config.image_token_id])
    grid = int(model.config.image_seq_length**0.5)
    rows, columns = torch.meshgrid(*2 * [(torch.arange(grid) + 0.5) * side / grid], indexing="ij")
    places = torch.stack([columns, rows], -1).view(1, 1, -1, 2)
    labels = torch.ones(1, 1, grid**2, dtype=torch.int32)
    clicks, _ = model.mask_model.get_prompt_embeddings(input_points=places, input_labels=labels)
    found = _ridge(torch.cat(states), clicks[0, 0, : grid**2].repeat(scenes, 1))
    first, second = model.seg_projector.linear_1, model.seg_projector.linear_2
    first.weight.copy_(torch.eye(len(first.weight)))
    first.bias.fill_(ALL_ABOVE)
    second.weight.copy_(found[:-1].T)
    second.bias.copy_(found[-1] - ALL_ABOVE * found[:-1].sum(0))


def _ridge(seen: Tensor, wanted: Tensor) -> Tensor:
    """The best linear map, its constants last."""
    seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
    return torch.linalg.solve(seen.T @ seen + RIDGE * len(seen) * torch.eye(seen.shape[1]), seen.T @ wanted)


def _solve(projector: nn.Module, seen: Tensor, wanted: Tensor) -> None:
    """Set the projector to the best linear map, both of its layers together, by ridge regression."""
    found = _ridge(seen, wanted)
    result = seen @ found[:-1] + found[-1]
    scale = 1 / result.std()  # of what GELU sees, around ABOVE
    projector.linear_1.weight.copy_(scale * found[:-1].T)
    projector.linear_1.bias.copy_(scale * found[-1] + ABOVE)
    projector.linear_2.weight.copy_(torch.eye(len(found[0])) / scale)
    projector.linear_2.bias.fill_(-ABOVE / scale)
