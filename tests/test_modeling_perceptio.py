"""The model on ids alone: masks and depth belong to the right place, nothing is computed that nobody asked for."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from perceptio.generation_perceptio import parse_span
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

CONFIG = tiny_config()
SEG, START, END = CONFIG.seg_token_id, CONFIG.depth_start_token_id, CONFIG.depth_end_token_id
PICTURE = [CONFIG.image_token_id] * CONFIG.image_seq_length
OPENINGS = {"seg+depth": [SEG, START], "seg": [SEG], "depth": [START], "none": []}
PAD, EOS = 0, 1


@dataclass
class Batch:
    modes: list[str]
    inputs: dict

    def alone(self, row: int) -> dict:
        """Row `row` as a batch of one, without its padding."""
        used = self.inputs["attention_mask"][row].bool()
        one = {
            "input_ids": self.inputs["input_ids"][row : row + 1, used],
            "attention_mask": torch.ones(1, int(used.sum()), dtype=torch.long),
            "pixel_values": self.inputs["pixel_values"][row : row + 1],
        }
        if "seg" in self.modes[row]:
            rank = sum("seg" in mode for mode in self.modes[:row])
            one["sam_pixel_values"] = self.inputs["sam_pixel_values"][rank : rank + 1]
        return one


def make_batch(*modes: str, seed: int = 0) -> Batch:
    """One picture and a few words per row, left-padded."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[20 + row, *PICTURE, *range(30, 33 + row), *OPENINGS[mode]] for row, mode in enumerate(modes)]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(len(rows), 3, 32, 32, generator=generator),
    }
    if any("seg" in mode for mode in modes):
        count = sum("seg" in mode for mode in modes)
        inputs["sam_pixel_values"] = torch.randn(count, 3, 64, 64, generator=generator)
    return Batch(list(modes), inputs)


@pytest.fixture(scope="module")
def model() -> PerceptioForConditionalGeneration:
    torch.manual_seed(0)
    model = PerceptioForConditionalGeneration(CONFIG).eval()
    # Random weights of the library's size give nearly equal scores: enlarge them, so that the argmax is no coin toss.
    for parameter in model.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def perceive(model, batch_inputs, **kwargs):
    torch.manual_seed(1)
    return model.perceive(**batch_inputs, **{"max_new_tokens": 16, **kwargs})


DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 3.0},
    "hot sampling, two returned": {"do_sample": True, "temperature": 100.0, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 5.0},
    "banned n-grams": {"no_repeat_ngram_size": 1},
    "suppressed codes": {"suppress_tokens": list(range(SEG, SEG + 11))},
    "banned words": {"bad_words_ids": [[START + 2], [END]]},
    "top-p 0": {"do_sample": True, "top_p": 1e-6},
}


@pytest.mark.parametrize("how", DECODING)
def test_every_way_of_decoding_obeys_the_grammar_and_ties_masks_to_their_seg(model, how):
    """The state at [SEG] is taken while generating; a plain forward over the finished row must find the same."""
    batch = make_batch("seg+depth", "seg", "depth", "none")
    output = perceive(model, batch.inputs, **DECODING[how])
    copies = len(output.sequences) // 4
    expected_masks = []
    for row, ids in enumerate(output.sequences.tolist()):
        mode = batch.modes[row // copies]
        span = parse_span(ids, CONFIG, start=output.prompt_length - len(OPENINGS[mode]), skip=(PAD, EOS))
        assert span.valid, span.problems
        assert (span.depth_codes is not None) == ("depth" in mode)
        assert bool(span.seg_positions) == ("seg" in mode)
        expected_masks += [(row, column) for column in span.seg_positions]
    assert list(zip(output.mask_rows.tolist(), output.mask_positions.tolist(), strict=True)) == expected_masks
    features = model.encode_pictures(batch.inputs["sam_pixel_values"])
    written = torch.ones(output.sequences.shape[1] - output.prompt_length)
    for index, (row, column) in enumerate(expected_masks):
        source = row // copies
        again = model(
            input_ids=output.sequences[row : row + 1, : column + 1],
            attention_mask=torch.cat([batch.inputs["attention_mask"][source], written])[None, : column + 1],
            pixel_values=batch.inputs["pixel_values"][source : source + 1],
        )
        mask = model.decode_masks(again.last_hidden_state[:, -1], features, [source])
        torch.testing.assert_close(output.mask_logits[index], mask.mask_logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.object_scores[index], mask.object_scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_same_rows_masks_and_depth(model, how):
    batch = make_batch("seg+depth")
    kwargs = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": model}
    plain, assisted = perceive(model, batch.inputs), perceive(model, batch.inputs, **kwargs)
    assert torch.equal(plain.sequences, assisted.sequences)
    torch.testing.assert_close(plain.mask_logits, assisted.mask_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.depth_codes, assisted.depth_codes)


def test_a_batch_equals_its_rows_one_by_one(model):
    batch = make_batch("none", "seg+depth", "depth", "seg", "seg+depth")
    output = perceive(model, batch.inputs)
    masks, maps = 0, 0
    for row in range(5):
        one = perceive(model, batch.alone(row))
        length = output.prompt_length - one.prompt_length
        written = one.sequences[0].tolist()
        assert output.sequences[row, length:].tolist()[: len(written)] == written
        if "seg" in batch.modes[row]:
            count = len(one.mask_rows)
            assert output.mask_rows[masks : masks + count].tolist() == [row] * count
            torch.testing.assert_close(
                output.mask_logits[masks : masks + count], one.mask_logits, rtol=1e-4, atol=1e-4
            )
            masks += count
        if "depth" in batch.modes[row]:
            assert output.depth_rows[maps] == row
            torch.testing.assert_close(output.depth[maps], one.depth[0], rtol=1e-4, atol=1e-4)
            maps += 1
    assert masks == len(output.mask_rows) and maps == len(output.depth_rows)


@pytest.mark.parametrize(
    ("mode", "pictures", "maps"), [("none", 0, 0), ("depth", 0, 1), ("seg", 1, 0), ("seg+depth", 1, 1)]
)
def test_each_part_runs_once_and_only_if_asked_for(model, mode, pictures, maps):
    """One SAM2 encoder call per picture, however many masks; the depth decoder only for depth; one pass per token."""
    batch, calls = make_batch(mode, mode), {"encoder": 0, "decoder": 0, "depth": 0, "columns": 0}

    def count(part, size):
        return lambda module, args, kwargs, output: calls.__setitem__(part, calls[part] + size(args, kwargs))

    hooks = [
        model.mask_model.vision_encoder.register_forward_hook(
            count("encoder", lambda a, k: len(a[0])), with_kwargs=True
        ),
        model.mask_model.mask_decoder.register_forward_hook(count("decoder", lambda a, k: 1), with_kwargs=True),
        model.depth_model.decoder.register_forward_hook(count("depth", lambda a, k: len(a[0])), with_kwargs=True),
        model.model.language_model.register_forward_hook(
            count("columns", lambda a, k: k["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    try:
        output = perceive(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls["encoder"] == 2 * pictures and calls["decoder"] == pictures and calls["depth"] == 2 * maps
    assert calls["columns"] == output.sequences.shape[1] - 1  # no second forward; the last token needs none
    for name in ("mask_logits", "mask_scores", "object_scores", "mask_rows", "mask_positions"):
        assert (getattr(output, name) is not None) == bool(pictures)
    for name in ("depth", "depth_codes", "depth_rows"):
        assert (getattr(output, name) is not None) == bool(maps)


def test_scores_are_probabilities_and_the_best_candidate_is_kept(model):
    batch = make_batch("seg")
    features = model.encode_pictures(batch.inputs["sam_pixel_values"])
    output = model.decode_masks(torch.randn(6, 32), features, [0] * 6)
    assert ((output.mask_scores >= 0) & (output.mask_scores <= 1)).all()
    assert ((output.object_scores >= 0) & (output.object_scores <= 1)).all()
    assert output.mask_logits.shape == (6, 16, 16)


def test_masks_do_not_depend_on_their_neighbours(model):
    """Peers encode the picture anew for every [SEG]; here all masks share one encoding and still stand alone."""
    pictures, states = torch.randn(2, 3, 64, 64), torch.randn(4, 32)
    features = model.encode_pictures(pictures)
    together = model.decode_masks(states, features, [0, 1, 1, 0])
    for index, picture in enumerate([0, 1, 1, 0]):
        alone = model.decode_masks(
            states[index : index + 1], model.encode_pictures(pictures[picture : picture + 1]), [0]
        )
        torch.testing.assert_close(together.mask_logits[index], alone.mask_logits[0], rtol=1e-4, atol=1e-5)


def test_the_mask_branch_equals_sam2_with_one_more_prompt_token(model):
    """With a zero-width projector, what is left is SAM2's own answer to "no prompt" plus a zero token."""
    sam, pictures = model.mask_model, torch.randn(1, 3, 64, 64)
    embeddings = sam.get_image_embeddings(pictures)
    for ours, theirs in zip(model.encode_pictures(pictures), embeddings, strict=True):
        assert ours.shape[-2:] == theirs.shape[-2:]
    state = torch.randn(1, 32)
    sparse, dense = sam.prompt_encoder(torch.zeros(1, 1, 1, 2), -torch.ones(1, 1, 1, dtype=torch.int32), None, None)
    logits, ious, _, _ = sam.mask_decoder(
        image_embeddings=embeddings[-1],
        image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=torch.cat([sparse, model.seg_projector(state)[:, None, None]], 2),
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=embeddings[:-1],
    )
    output = model.decode_masks(state, model.encode_pictures(pictures), [0])
    torch.testing.assert_close(output.mask_logits[0], logits[0, 0, ious[0, 0].argmax()])


def test_the_mask_branch_is_differentiable_up_to_the_hidden_state(model):
    states = torch.randn(2, 32, requires_grad=True)
    model.decode_masks(states, model.encode_pictures(torch.randn(1, 3, 64, 64)), [0, 0]).mask_logits.sum().backward()
    assert (states.grad.abs().sum(-1) > 0).all()


def test_what_the_language_loss_does_not_reach_is_frozen(model):
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    thawed = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert frozen == {"seg_projector", "mask_model", "depth_model"} and thawed == {"model", "lm_head"} - (
        {"lm_head"} if CONFIG.tie_word_embeddings else set()
    )


@pytest.mark.parametrize("tokens", [1, CONFIG.span_length - 1, CONFIG.span_length])
def test_too_few_tokens_for_the_span_is_said_before_generating(model, tokens):
    with pytest.raises(ValueError, match=f"max_new_tokens={CONFIG.span_length + 2}"):
        perceive(model, make_batch("seg+depth").inputs, max_new_tokens=tokens)


def test_just_enough_tokens_give_a_whole_span(model):
    output = perceive(model, make_batch("depth").inputs, max_new_tokens=CONFIG.span_length + 1)
    assert output.depth_codes.shape == (1, CONFIG.span_length) and output.sequences[0, -1] == END


def test_a_mask_without_its_picture_is_refused(model):
    inputs = make_batch("seg", "seg").inputs
    with pytest.raises(ValueError, match="2 prompts open with .SEG., but `sam_pixel_values` holds 1"):
        model.perceive(**{**inputs, "sam_pixel_values": inputs["sam_pixel_values"][:1]}, max_new_tokens=4)
    with pytest.raises(ValueError, match="holds 0 pictures"):
        model.perceive(**{k: v for k, v in inputs.items() if k != "sam_pixel_values"}, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"expected \[pictures, 3, 64, 64\]"):
        model.perceive(**{**inputs, "sam_pixel_values": torch.zeros(2, 3, 32, 32)}, max_new_tokens=4)


def test_generate_takes_everything_the_processor_returns(model):
    inputs = make_batch("seg+depth").inputs
    ids = model.generate(**inputs, original_sizes=torch.tensor([[5, 7]]), max_new_tokens=12)
    assert torch.equal(ids, perceive(model, inputs, max_new_tokens=12).sequences)


def test_forward_takes_everything_the_processor_returns(model):
    inputs = make_batch("seg+depth").inputs
    output = model(**inputs, original_sizes=torch.tensor([[5, 7]]), labels=inputs["input_ids"])
    plain = model(**{k: v for k, v in inputs.items() if k != "sam_pixel_values"}, labels=inputs["input_ids"])
    assert torch.equal(output.logits, plain.logits) and output.loss == plain.loss
    assert output.last_hidden_state.shape == (1, inputs["input_ids"].shape[1], 32)


def test_a_cache_goes_in_and_out_by_the_name_that_the_installed_transformers_has_for_it(model):
    inputs = make_batch("none").inputs
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[40]])], 1), "attention_mask": None}
    start = model(**inputs)
    name = "cache" if "cache" in start else "past_key_values"
    last = model(input_ids=longer["input_ids"][:, -1:], **{name: start[name]})
    torch.testing.assert_close(last.logits, model(**longer).logits[:, -1:])
    ids = model.generate(**inputs, **{name: DynamicCache()}, max_new_tokens=4)
    assert torch.equal(ids, model.generate(**inputs, max_new_tokens=4))
    with pytest.raises(ValueError, match="names of one thing"):
        model(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


def test_a_model_that_is_made_in_half_precision_keeps_the_depth_branch_exact():
    model = AutoModelForImageTextToText.from_config(CONFIG, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.depth_model.state_dict().values()} == {torch.float32}


def test_nan_weights_name_the_step(model):
    head = model.lm_head.weight
    with torch.no_grad():
        kept = head[3].clone()
        head[3] = torch.nan
        try:
            with pytest.raises(FloatingPointError, match="generated token 0"):
                perceive(model, make_batch("none").inputs)
        finally:
            head[3] = kept


def test_a_streamer_that_raises_ends_the_generation(model):
    class Broken:
        def put(self, value):
            raise RuntimeError("the reader is gone")

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="the reader is gone"):
        perceive(model, make_batch("none").inputs, streamer=Broken())
    assert perceive(model, make_batch("none").inputs).sequences.shape[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_gives_finite_masks_and_depth(dtype):
    torch.manual_seed(0)
    model = PerceptioForConditionalGeneration(CONFIG).eval().to(dtype)
    output = perceive(model, make_batch("seg+depth").inputs, eos_token_id=EOS, pad_token_id=PAD)
    assert output.mask_logits.dtype == output.depth.dtype == torch.float32
    assert torch.isfinite(output.mask_logits).all() and torch.isfinite(output.depth).all()


def test_embeddings_as_a_prompt_give_plain_text(model):
    """No opening can be read off embeddings, so no perception token may follow, sampled or not."""
    inputs = make_batch("none").inputs
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    torch.manual_seed(0)
    ids = model.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], max_new_tokens=40,
                         do_sample=True, temperature=100.0, eos_token_id=None)  # fmt: skip
    assert ids.shape == (1, 40) and not (ids >= CONFIG.image_token_id).any()
