"""The processor: what goes into the model, and what comes out of it, at the right size, in the right row."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessorPil

from perceptio import DepthSpanError, PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio.hub.tiny_text import tiny_processor, tiny_tokenizer
from perceptio.modeling_perceptio import PerceptioGenerationOutput
from perceptio.processing_perceptio import add_perception_tokens

PICTURES = [
    Image.fromarray(np.random.RandomState(i).randint(0, 255, (20 + 7 * i, 33, 3), dtype=np.uint8)) for i in range(5)
]
TOKENIZE = {
    "tokenize": True,
    "add_generation_prompt": True,
    "return_dict": True,
    "return_tensors": "pt",
    "processor_kwargs": {"padding": True},
}


def chat(index: int, pictures: int = 1) -> list[dict]:
    parts = [{"type": "image", "image": PICTURES[index]}] * pictures
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "where is it? " * (index + 1)}]}]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def processor(request) -> PerceptioProcessor:
    return tiny_processor(request.param)


@pytest.fixture(scope="module")
def model(tiny_folder) -> PerceptioForConditionalGeneration:
    return PerceptioForConditionalGeneration.from_pretrained(tiny_folder()).eval()


@pytest.fixture(scope="module")
def loaded(tiny_folder) -> PerceptioProcessor:
    return PerceptioProcessor.from_pretrained(tiny_folder())


# Tokens


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_every_control_token_is_one_id_and_codes_are_contiguous(family):
    """With some Llama tokenizers [SEG] was two ids, and masks came doubled (LISA #55)."""
    tokenizer = tiny_tokenizer(family)
    ids = add_perception_tokens(tokenizer, 8)
    assert add_perception_tokens(tokenizer, 8) == ids
    first, count = ids["depth_code_token_ids"]
    for token, expected in [("[SEG]", ids["seg_token_id"]), ("<d_start>", ids["depth_start_token_id"]),
                            ("<d_end>", ids["depth_end_token_id"]),
                            *((f"<d_{k}>", first + k) for k in range(count))]:  # fmt: skip
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False).count(expected) == 1
        assert tokenizer.encode(token, add_special_tokens=False) == [expected]


def test_a_tokenizer_of_another_codebook_is_refused():
    tokenizer = tiny_tokenizer()
    add_perception_tokens(tokenizer, 8)
    with pytest.raises(ValueError, match="more than the 4 depth codes"):
        add_perception_tokens(tokenizer, 4)
    with pytest.raises(ValueError, match="has no <d_15>"):
        PerceptioProcessor(GotOcr2ImageProcessorPil(), tokenizer, num_depth_codes=16)


def test_a_tokenizer_without_chat_tokens_is_refused():
    from transformers import Qwen2Tokenizer

    with pytest.raises(ValueError, match="has no <img>"):
        add_perception_tokens(Qwen2Tokenizer(vocab={"a": 0}, merges=[]), 8)


# In


@pytest.mark.parametrize(
    ("mode", "opening"), [("seg+depth", "[SEG]<d_start>"), ("seg", "[SEG]"), ("depth", "<d_start>"), ("none", "")]
)
def test_the_mode_decides_what_the_answer_opens_with(processor, mode, opening):
    prompt = processor.apply_chat_template(chat(0), perception=mode, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n" + opening)


@pytest.mark.parametrize(("pictures", "opening"), [(0, ""), (1, "[SEG]<d_start>"), (2, "")])
def test_by_default_one_picture_is_perceived(processor, pictures, opening):
    prompt = processor.apply_chat_template(chat(0, pictures), add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n" + opening)


def test_without_a_generation_prompt_nothing_is_opened(processor):
    history = [*chat(0), {"role": "assistant", "content": "It is"}]
    assert processor.apply_chat_template(history).endswith("It is<|im_end|>\n")
    assert processor.apply_chat_template(history, continue_final_message=True).endswith("assistant\nIt is")


@pytest.mark.parametrize(
    ("pictures", "mode", "message"),
    [(2, "seg", "has 2 pictures"), (0, "depth", "has 0 pictures"), (1, "all", "'all'")],
)
def test_a_mode_that_cannot_be_is_refused(processor, pictures, mode, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(chat(0, pictures), perception=mode, **TOKENIZE)


def test_a_batch_mixes_modes_lengths_and_pictures_and_equals_its_rows(processor):
    chats, modes = [chat(0), chat(1), chat(2, 0), chat(3, 2), chat(4)], ["seg", None, None, None, "depth"]
    batch = processor.apply_chat_template(chats, perception=modes, **TOKENIZE)
    assert batch["sam_pixel_values"].shape == (2, 3, 64, 64)
    assert batch["original_sizes"].tolist() == [[20, 33], [27, 33], [48, 33]]
    tiles = 0
    for row in range(5):
        single = processor.apply_chat_template(chats[row], perception=modes[row], **TOKENIZE)
        used = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][used], single["input_ids"][0])
        if "pixel_values" in single:
            count = len(single["pixel_values"])
            assert torch.equal(batch["pixel_values"][tiles : tiles + count], single["pixel_values"])
            tiles += count
    assert tiles == len(batch["pixel_values"])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 16 * tiles


def test_tiles_are_those_of_the_librarys_own_image_processor(processor):
    mine = processor.apply_chat_template(chat(4), perception="none", **TOKENIZE)["pixel_values"]
    library = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    assert torch.equal(mine, library(PICTURES[4], return_tensors="pt")["pixel_values"])


def test_the_picture_for_sam2_follows_its_rule(processor):
    """Squeezed to a square, bilinear, ImageNet statistics: against torch's antialiased resize of the same picture."""
    mine = processor.apply_chat_template(chat(4), perception="seg", **TOKENIZE)["sam_pixel_values"]
    pixels = torch.tensor(np.asarray(PICTURES[4])).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized - mean[:, None, None]) / std[:, None, None]
    # PIL rounds to eight bits between its two passes and at the end: one step of 1/255, divided by the deviation.
    torch.testing.assert_close(mine, expected, rtol=0, atol=2 / 255 / 0.224)


def test_pictures_and_placeholders_must_agree(processor):
    with pytest.raises(ValueError, match="found 1 tokens and 0 images"):
        processor(text="<IMG_CONTEXT>x")
    with pytest.raises(ValueError, match="found 0 tokens and 1 images"):
        processor(images=PICTURES[0], text="x")
    with pytest.raises(ValueError, match="nested as"):
        processor(images=[[PICTURES[0], PICTURES[1]], []], text=["<IMG_CONTEXT>", "<IMG_CONTEXT>"])
    with pytest.raises(ValueError, match="picture 1"):
        processor(images=[PICTURES[0], b"no"], text="<IMG_CONTEXT><IMG_CONTEXT>")
    with pytest.raises(ValueError, match="`text` is NoneType"):
        processor()


def test_padding_on_the_right_of_an_opening_is_refused(processor):
    with pytest.raises(ValueError, match="pad on the left"):
        processor(
            images=PICTURES[0], text="<IMG_CONTEXT>a[SEG]", padding="max_length", max_length=200, padding_side="right"
        )


# Out


@pytest.fixture(scope="module")
def mixed(model, loaded):
    """Six rows: both, none (no picture), seg, depth, none (two pictures), none (one picture)."""
    chats = [chat(0), chat(1, 0), chat(2), chat(3), chat(4, 2), chat(4)]
    modes = ["seg+depth", None, "seg", "depth", None, "none"]
    return loaded.apply_chat_template(chats, perception=modes, **TOKENIZE)


@pytest.mark.parametrize("copies", [1, 2])
def test_masks_depth_and_spans_land_on_their_rows_at_the_size_of_their_pictures(model, loaded, mixed, copies):
    torch.manual_seed(0)
    output = model.perceive(**mixed, max_new_tokens=14, do_sample=copies > 1, num_return_sequences=copies)
    masks = loaded.post_process_masks(output, object_threshold=0.0)
    maps, spans = loaded.post_process_depth(output), loaded.parse(output, strict=True)
    assert len(masks) == len(maps) == len(spans) == 6 * copies
    sizes = {0: (20, 33), 2: (34, 33), 3: (41, 33)}
    for row in range(6 * copies):
        source = row // copies
        assert [entry.position for entry in masks[row]] == spans[row].seg_positions
        assert bool(masks[row]) == (source in (0, 2))
        for entry in masks[row]:
            assert tuple(entry.mask.shape) == sizes[source] and entry.area == int(entry.mask.sum())
        assert (maps[row] is not None) == (spans[row].depth_codes is not None) == (source in (0, 3))
        if maps[row] is not None:
            assert tuple(maps[row].shape) == sizes[source]


def made_output(logits: torch.Tensor, loaded, size=(40, 60), object_score: float = 0.9) -> PerceptioGenerationOutput:
    start = loaded.tokenizer.convert_tokens_to_ids("<img>")
    return PerceptioGenerationOutput(
        sequences=torch.tensor([[start, 5, 6, 7]]),
        prompt_length=3,
        mask_logits=logits,
        mask_scores=torch.tensor([0.8]),
        object_scores=torch.tensor([object_score]),
        mask_rows=torch.tensor([0]),
        mask_positions=torch.tensor([2]),
        original_sizes=torch.tensor([size]),
    )


def test_a_mask_comes_out_where_it_went_in(loaded):
    logits = torch.full((1, 16, 16), -10.0)
    logits[0, :8, 8:] = 10.0
    entry = loaded.post_process_masks(made_output(logits, loaded))[0][0]
    assert entry.mask[:19, 32:].all() and not entry.mask[21:].any() and not entry.mask[:, :28].any()
    assert entry.score == pytest.approx(0.8) and entry.object_score == pytest.approx(0.9) and entry.position == 2


def test_thresholds_and_forms_of_a_mask(loaded):
    logits = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    output = made_output(logits, loaded)
    probability = loaded.post_process_masks(output, output_type="probability")[0][0].mask
    assert probability.dtype == torch.float32 and 0 <= probability.min() and probability.max() <= 1
    for threshold in (0.3, 0.5, 0.8):
        binary = loaded.post_process_masks(output, threshold=threshold)[0][0]
        assert torch.equal(binary.mask, probability > threshold) and binary.area == int(binary.mask.sum())


def test_run_lengths_decode_to_the_same_mask(loaded):
    coco = pytest.importorskip("pycocotools.mask")
    output = made_output(torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1)), loaded)
    entry = loaded.post_process_masks(output, output_type="rle")[0][0]
    binary = loaded.post_process_masks(output)[0][0].mask
    assert np.array_equal(coco.decode(entry.mask).astype(bool), binary.numpy())
    assert coco.area(entry.mask) == entry.area


def test_what_is_not_there_has_no_mask_and_keeps_its_scores(loaded):
    """The nearest peer masks something on every question about an absent thing."""
    output = made_output(torch.full((1, 16, 16), 10.0), loaded, object_score=0.2)
    entry = loaded.post_process_masks(output)[0][0]
    assert entry.mask is None and entry.area == 0 and entry.object_score == pytest.approx(0.2)
    assert loaded.post_process_masks(output, object_threshold=0.1)[0][0].mask.all()


def test_depth_is_row_major_and_upright(loaded, model):
    """A gradient from the left to the right stays one; transposed it would run from the top to the bottom."""
    ramp = torch.linspace(0, 1, 24).repeat(24, 1)[None]
    depth = loaded.post_process_depth(ramp, [(10, 50)])[0]
    assert tuple(depth.shape) == (10, 50)
    assert (depth.diff(dim=1) >= 0).all() and depth.diff(dim=0).abs().max() < 1e-6
    codes = torch.zeros(1, 9, dtype=torch.long)
    codes[0, 2] = 1  # first row, last column
    changed = (model.decode_depth(codes) - model.decode_depth(torch.zeros(1, 9, dtype=torch.long))).abs()[0]
    assert changed[:8, 16:].sum() > changed[16:, :8].sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.post_process_masks(torch.full((1, 4, 4), torch.nan), [(3, 3)]), "NaN"),
        (lambda p: p.post_process_depth(torch.full((1, 4, 4), torch.nan), [(3, 3)]), "NaN"),
        (lambda p: p.post_process_masks(torch.zeros(2, 4, 4), [(3, 3)]), "original_sizes"),
        (lambda p: p.post_process_masks(torch.zeros(2, 4, 4)), "original_sizes"),
        (lambda p: p.post_process_masks(torch.zeros(1, 4, 4), [(3, 3)], threshold=1.5), "threshold"),
        (lambda p: p.post_process_masks(torch.zeros(1, 4, 4), [(3, 3)], output_type="polygon"), "polygon"),
    ],
)
def test_what_cannot_be_processed_is_said(loaded, call, message):
    with pytest.raises(ValueError, match=message):
        call(loaded)


def test_strict_parsing_names_the_row(loaded, model, mixed):
    output = model.perceive(**mixed, max_new_tokens=14)
    broken = output.sequences.clone()
    broken[3, -3:] = loaded.depth_start_token_id
    assert not loaded.parse(broken, output.prompt_length)[3].valid
    with pytest.raises(DepthSpanError, match="sequence 3"):
        loaded.parse(broken, output.prompt_length, strict=True)


def test_bare_ids_are_read_from_the_last_turn(loaded):
    span = "[SEG]<d_start>" + "".join(f"<d_{i % 8}>" for i in range(9)) + "<d_end>the cup<|im_end|>"
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + span
    found = loaded.parse([loaded.tokenizer.encode(text, add_special_tokens=False)])[0]
    assert found.valid and found.answer == "the cup" and found.depth_codes == [i % 8 for i in range(9)]


def test_the_response_template_structures_the_answer(loaded):
    prefix = "<|im_start|>assistant\n[SEG]<d_start>"
    message = loaded.parse_response("<d_1><d_2><d_end>the cup [SEG] is<|im_end|>", prefix=prefix)
    assert message["role"] == "assistant" and message["content"] == "the cup  is"
    assert len(message["segmentation"]) == 2 and "<d_1><d_2>" in str(message["depth"])


def test_the_response_template_works_while_it_streams(loaded):
    parser = loaded.tokenizer.get_response_parser(prefix="<|im_start|>assistant\n[SEG]<d_start>")
    for piece in ("<d_1>", "<d_2>", "<d_end>", "the", " cup", " is", "<|im_end|>"):
        parser.feed(piece)
    assert parser.finalize()[0]["content"] == "the cup is"


# Folders


def test_saved_and_loaded_it_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = PerceptioProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
    assert again.tokenizer.response_template == processor.tokenizer.response_template
    batch = [p.apply_chat_template(chat(1), **TOKENIZE) for p in (processor, again)]
    for key, value in batch[0].items():
        assert torch.equal(value, batch[1][key]), key


def test_a_processor_of_another_model_is_refused(model, loaded):
    assert loaded.check_config(model.config) is loaded
    with pytest.raises(ValueError, match="load both from one folder"):
        tiny_processor("qwen2", num_codes=16).check_config(model.config)
    with pytest.raises(ValueError, match="span_length"):
        tiny_processor("qwen2", grid_size=4).check_config(model.config)
