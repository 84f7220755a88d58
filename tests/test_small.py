"""perceptio-tiny before its training: it fits its budget, writes any text, and runs whole."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLVisionModel, Sam2Model

from perceptio.hub.manifest import verify_manifest
from perceptio.hub.small import build_small, deepened, main, world_texts, world_tokenizer
from perceptio.hub.train_tiny import MORE_LAYERS
from perceptio.modeling_convolutions import PerceptioVisionModel
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.pipeline_perceptio import PerceptioPipeline
from perceptio.processing_perceptio import PerceptioProcessor
from perceptio.teachers.sam import sam_config
from perceptio.teachers.vision import VisionTrainingConfig, draw_cells, vision_config
from perceptio.world.instances import scene_instances
from perceptio.world.surfaces import COLOURS

DEPTH = "checkpoints/depth-tiny"
MOST_PARAMETERS, MOST_BYTES = 24_000_000, 48 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    place = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    Sam2Model(sam_config(192, 48, [1, 2, 5, 2], 128)).save_pretrained(place / "sam")
    InternVLVisionModel(vision_config(224, 14, 256, 8, 4)).save_pretrained(place / "vision")
    build_small(place / "base", place / "sam", place / "vision", request.config.rootpath / DEPTH, scenes=30, solved=8)
    return place / "base"


def test_it_fits_its_budget_and_is_whole(folder):
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    weights = list(model.parameters())
    assert sum(weight.numel() for weight in weights) <= MOST_PARAMETERS
    kept = sum(weight.numel() * 4 for weight in model.depth_model.parameters())
    halves = sum(weight.numel() * 2 for weight in weights) - kept // 2
    assert halves + kept <= MOST_BYTES
    assert not verify_manifest(folder) and model.config.untrained
    assert model.config.span_length == 100 and model.config.depth_config.codebook_hash


def test_a_deeper_tower_sees_the_same_at_first(request):
    """What its new layers add can be learned at once, the rest of them behind it."""
    folder = request.config.rootpath / "checkpoints/vision-tiny"
    tower = PerceptioVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    deep = deepened(tower, 2).eval()
    assert deep.config.num_hidden_layers == len(deep.encoder.layer) == tower.config.num_hidden_layers + 2
    picture = torch.from_numpy(scene_instances(3, 9, "test", 320)["image"]).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        before = tower(pixel_values=picture).last_hidden_state
    optimizer = torch.optim.SGD(deep.parameters(), 1e-2)
    for step in range(2):
        after = deep(pixel_values=picture).last_hidden_state
        assert torch.equal(after, before) == (step == 0)
        optimizer.zero_grad()
        after[:, 1:].square().mean().backward()
        new = [weight.grad.any().item() for weight in deep.encoder.layer[-2:].parameters()]
        assert any(new) and all(new) == (step == 1)
        optimizer.step()
    assert deepened(tower, 0) is tower


def test_its_parts_are_the_trained_ones(folder):
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    vision, sam = (kind.from_pretrained(folder.parent / name) for kind, name in
                   ((InternVLVisionModel, "vision"), (Sam2Model, "sam")))  # fmt: skip
    for found, given in ((model.model.vision_tower, vision), (model.mask_model, sam)):
        weights = found.state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in given.state_dict().items())


def test_its_parts_can_be_those_of_a_perceptio(folder, tmp_path):
    first = PerceptioForConditionalGeneration.from_pretrained(folder)
    again = build_small(tmp_path / "again", folder, folder, folder, seed=1, scenes=30, solved=8)
    weights, before = again.state_dict(), first.state_dict()
    frozen = ("model.vision_tower.", "mask_model.", "depth_model.")
    assert all(torch.equal(weights[key], before[key]) for key in before if key.startswith(frozen))
    assert not torch.equal(weights["lm_head.weight"], before["lm_head.weight"])
    assert again.config.vision_config.to_dict() == first.config.vision_config.to_dict()


def test_it_runs_with_every_part(folder):
    model = PerceptioForConditionalGeneration.from_pretrained(folder).eval()
    pipe = PerceptioPipeline(model=model, processor=PerceptioProcessor.from_pretrained(folder))
    picture = Image.new("RGB", (300, 200), (90, 120, 60))
    found = pipe(image=picture, text="Which one is nearer?", perception="seg+depth", max_new_tokens=106)
    assert len(found["depth_codes"]) == 100 and found["predicted_depth"].shape == (200, 300)
    for size in ((300, 200), (640, 448), (100, 1000)):  # one tile, which is all that it is trained on
        tiles = pipe.processor(images=Image.new("RGB", size), text=["<IMG_CONTEXT>"])["pixel_values"]
        assert [tile.shape for tile in tiles] == [(3, 224, 224)]


def test_a_picture_stands_behind_the_words_of_its_message(folder):
    """So that every depth code is as far from its part of the picture, however long the question is."""
    processor = PerceptioProcessor.from_pretrained(folder)
    distances = set()
    for question in ("Where?", "Which one of all the things is the nearest?"):
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        for content in (parts, parts[::-1]):
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            assert text.index(question) < text.index("<IMG_CONTEXT>") and text.endswith("[SEG]<d_start>")
            ids = processor(images=Image.new("RGB", (50, 40)), text=[text])["input_ids"][0]
            distances.add(len(ids) - ids.index(processor.image_token_id))
    assert len(distances) == 1


@pytest.fixture(scope="module")
def begun(tmp_path_factory, request):
    """On the trained teachers."""
    folder, root = tmp_path_factory.mktemp("begun") / "base", request.config.rootpath
    parts = [root / "checkpoints" / name for name in ("sam-tiny", "vision-tiny", "depth-tiny")]
    model = build_small(folder, *parts, more_layers=MORE_LAYERS, scenes=30, solved=64)
    return model, PerceptioProcessor.from_pretrained(folder)


def test_it_begins_with_pictures_in_the_words_for_what_they_show(begun, tmp_path):
    """On scenes that nothing was solved for on."""
    model, processor = begun
    words = model.get_input_embeddings().weight.detach()
    colours = words[[processor.tokenizer.encode(f" {colour}")[0] for colour in COLOURS]]
    side = model.config.vision_config.image_size[0]
    args = VisionTrainingConfig(str(tmp_path), side=side, scene_side=side, patch=16, cells=2)
    parts = side // 32
    right = asked = 0
    for index in range(12):
        scene = {name: torch.from_numpy(array) for name, array in scene_instances(index, 9, "test", side).items()}
        drawn = draw_cells(scene, args, np.random.default_rng(index), whole=True)
        with torch.no_grad():
            seen = model.model.get_image_features(drawn["pixel_values"][None]).pooler_output[0].view(parts, parts, -1)
        truth = drawn["colour"].unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)  # [parts, parts, 16]
        clear = (truth == truth[..., :1]).all(-1) & (truth[..., 0] > 0)
        right += ((seen[clear] @ colours.T).argmax(-1) + 1 == truth[..., 0][clear]).sum()
        asked += clear.sum()
    assert asked > 20 and right / asked > 0.5


def asked(processor, picture, codes: list[int]) -> dict:
    """A question about the picture, with the beginning of an answer that has these codes."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the mug?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=picture, text=[text], return_tensors="pt")
    first = processor.depth_code_token_ids[0]
    told = first + torch.tensor([codes], dtype=torch.long)
    return {"input_ids": torch.cat([inputs["input_ids"], told], 1), "pixel_values": inputs["pixel_values"]}


def test_it_begins_by_looking_from_each_code_at_its_part_of_the_picture(begun):
    """From where a code is told in the first layer, from the code itself in those behind, whatever the code is."""
    model, processor = begun
    model.set_attn_implementation("eager")
    count = model.config.span_length
    inputs = asked(processor, Image.new("RGB", (320, 320), (90, 120, 60)), list(range(count)))
    with torch.no_grad():
        layers = model.model(**inputs, output_attentions=True).attentions
    ids = inputs["input_ids"][0]
    picture = (ids == model.config.image_token_id).nonzero()[:, 0]
    assert len(picture) == count
    for layer, ahead in ((0, 1), (1, 0), (4, 0)):
        rows = torch.arange(count) + len(ids) - count - ahead
        weights = layers[layer][0, -1, rows]
        assert (weights.argmax(-1) == picture).all() and weights.gather(1, picture[:, None]).min() > 0.7


def test_it_begins_with_parts_of_pictures_that_prompt_like_clicks(begun):
    """A click on a part is the nearest to the prompt of that part, or of one beside it, on a new picture."""
    model, processor = begun
    scene = scene_instances(3, 9, "test", 320)["image"]
    inputs = asked(processor, Image.fromarray(scene), [])
    side, grid = model.config.mask_image_size, int(model.config.image_seq_length**0.5)
    middles = [(place + 0.5) * side / grid for place in range(grid)]
    places = [(x, y) for y in middles for x in middles]
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state[inputs["input_ids"] == model.config.image_token_id]
        clicks = model.mask_model.get_prompt_embeddings(
            input_points=torch.tensor(places)[None, None], input_labels=torch.ones(1, 1, grid**2, dtype=torch.int32)
        )[0][0, 0, : grid**2]
        nearest = torch.cdist(model.seg_projector(states), clicks).argmin(-1)
    apart = (nearest - torch.arange(grid**2)).abs()
    assert (apart <= grid + 1).float().mean() > 0.5


def test_codes_that_look_alike_begin_alike(folder):
    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    first, count = model.config.depth_code_token_ids
    begun = model.get_input_embeddings().weight.detach()[first : first + count]
    vectors = model.depth_model.codebook - model.depth_model.codebook.mean(0)
    alike = [torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1) for rows in (begun, vectors)]
    assert torch.corrcoef(torch.stack([part.flatten() for part in alike]))[0, 1] > 0.9


def test_the_tokenizer_writes_any_text_and_the_worlds_in_few_tokens():
    texts = world_texts(20)
    tokenizer = world_tokenizer(texts)
    for text in ("naïve 東京 🙂 \n\t{}", *texts[:50]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert tokens < 0.35 * sum(map(len, texts))


def test_wrong_teachers_are_one_line(tmp_path, capsys):
    absent = str(tmp_path / "absent")
    assert main([str(tmp_path / "base"), "--sam", absent, "--vision", absent]) == 2
    assert capsys.readouterr().err.startswith("perceptio: ")


def test_fewer_layers_than_none_is_one_line(tmp_path, capsys):
    parts = ["--sam", "checkpoints/sam-tiny", "--vision", "checkpoints/vision-tiny", "--more-layers", "-1"]
    assert main([str(tmp_path / "base"), *parts]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "perceptio: `more_layers` is -1, expected a number of layers"
    assert not (tmp_path / "base").exists()
