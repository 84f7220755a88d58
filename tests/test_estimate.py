"""The estimate of a run against what small models really count, hold and compute."""

import contextlib
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from perceptio.hub.assemble import PART_PREFIXES, layout_blueprint
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.training import estimate as estimating
from perceptio.training.estimate import (
    GPUS,
    PARTS,
    RunFacts,
    as_dict,
    count_parameters,
    count_tokens,
    estimate,
    gpu_hours,
    language_bytes_per_token,
    mask_bytes,
    memory_per_gpu,
    meta_model,
    report,
    sam_bytes_per_picture,
    vision_bytes_per_tile,
)

FACTS = RunFacts(world_size=4, batch_size=2, accumulation=2, steps=10, lora_r=4, precision="fp32")
FULL = replace(FACTS, lora_r=None)
FAMILIES = ("qwen2", "llama", "qwen3")


def wide_config(family="qwen2"):
    """Wide enough that what grows with the tokens outweighs what does not."""
    text = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    }  # fmt: skip
    return tiny_config(family, text_config=AutoConfig.for_model(family, **text))


def build(config, facts, dropout=0.05, eager=False):
    """A model ready to be trained, as the facts say, and its parameters by origin: the copies peft keeps, the rest."""
    from peft import get_peft_model

    from perceptio.training.adapters import peft_config, thaw

    torch.manual_seed(0)
    model = PerceptioForConditionalGeneration(config)
    if eager:
        model.set_attn_implementation("eager")
    if not facts.lora_r:
        thaw(model, vision=facts.train_vision)
        return model.train()
    if facts.precision == "bf16":
        model = model.bfloat16()
        model.depth_model.float()
    model = get_peft_model(model, peft_config(model, r=facts.lora_r, dropout=dropout)).get_base_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def copies(model):
    return [p for name, p in model.named_parameters() if ".original_module." in name]


# Parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_a_built_model(family, tied):
    config = tiny_config(family, tie_word_embeddings=tied)
    for facts in (FACTS, FULL, replace(FULL, train_vision=True)):
        model = build(config, facts)
        counts = count_parameters(meta_model(config, facts), facts).values()
        spare = sum(p.numel() for p in copies(model))
        assert sum(count.total for count in counts) == sum(p.numel() for p in model.parameters()) - spare
        assert sum(count.trained for count in counts) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_and_rows_are_those_of_peft():
    model = build(tiny_config(), FACTS)
    counts = count_parameters(meta_model(tiny_config(), FACTS), FACTS)
    for part, key in (("LoRA", ".lora_"), ("new token rows", ".trainable_tokens_delta")):
        real = sum(p.numel() for name, p in model.named_parameters() if key in name)
        assert counts[part].total == counts[part].trained == real > 0


@pytest.mark.parametrize("layout", ["4b", "8b"])
def test_published_sizes_are_those_of_their_layouts(layout):
    blueprint = layout_blueprint(layout)
    model = meta_model(blueprint.config, FACTS)
    counts = count_parameters(model, FACTS)
    for name in ("vision encoder", "projector", "seg projector"):
        stored = sum(torch.Size(s).numel() for k, s in blueprint.shapes.items() if k.startswith(PART_PREFIXES[name]))
        part = {"vision encoder": "vision tower"}.get(name, name)
        assert counts[part].total == stored
    buffers = dict(model.named_buffers())
    fixed = sum(buffers[key].numel() for key in blueprint.shapes if key in buffers)
    whole = sum(counts[part].total for part in PARTS)
    assert whole + fixed == sum(blueprint.parameters().values())
    assert fixed < 1e-6 * whole


# Memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora_r", [4, None])
def test_weights_gradients_and_states_are_those_after_a_step(lora_r, precision):
    config, facts = tiny_config(), replace(FACTS, lora_r=lora_r, precision=precision)
    model = build(config, facts)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    memory = memory_per_gpu(meta_model(config, facts), facts)
    spare = {id(p) for p in copies(model)}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in spare]
    states = [s for state in optimizer.state.values() for s in state.values() if s.ndim]
    assert memory["frozen weights"] == sum(p.nbytes for p in frozen)
    assert memory["trained weights"] == sum(p.nbytes for p in trained)
    assert memory["untouched copies that peft keeps"] == sum(p.nbytes for p in copies(model))
    assert memory["gradients"] == sum(p.grad.nbytes for p in trained)
    assert memory["optimizer (AdamW)"] == sum(s.nbytes for s in states)


def test_half_precision_is_half_precision():
    short, half = (replace(FACTS, precision=kind) for kind in ("bf16", "fp16"))
    assert memory_per_gpu(meta_model(tiny_config(), short), short) == memory_per_gpu(
        meta_model(tiny_config(), half), half
    )


def test_sharded_states_share_out_what_one_gpu_would_hold():
    model = meta_model(tiny_config(), FACTS)
    whole, parted = (memory_per_gpu(model, replace(FACTS, sharding=kind)) for kind in ("none", "fsdp2"))
    for item in ("frozen weights", "trained weights", "gradients", "optimizer (AdamW)"):
        assert parted[item] == whole[item] / FACTS.world_size
    assert whole["gathered weights"] == 0 < parted["gathered weights"]
    assert parted["language model"] == whole["language model"]


def test_zero3_keeps_the_float32_copy_in_the_optimizer():
    facts = replace(FACTS, precision="bf16", sharding="zero3", lora_r=None)
    model = meta_model(tiny_config(), facts)
    trained = sum(count.trained for count in count_parameters(model, facts).values())
    memory = memory_per_gpu(model, facts)
    assert memory["trained weights"] == memory["gradients"] == 2 * trained / facts.world_size
    assert memory["optimizer (AdamW)"] == 12 * trained / facts.world_size


def test_a_4_bit_base_is_as_small_as_bitsandbytes_packs_it():
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(128, 256), quant_type="nf4")
    assert packed.nbytes + state.absmax.nbytes == 128 * 256 * estimating.BYTES_4BIT
    facts = replace(FACTS, precision="bf16")
    model = meta_model(tiny_config(), facts)
    linear = sum(layer.weight.numel() for layer in estimating.language_linears(model))
    whole, small = (memory_per_gpu(model, replace(facts, base_4bit=packed))["frozen weights"] for packed in (0, 1))
    assert whole - small == linear * (2 - estimating.BYTES_4BIT)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and still exist, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage()._cdata for x in tensors}
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def byte_masks(monkeypatch):
    """Dropout as a GPU does it: its mask is a byte for each number, where the CPU keeps a float."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0] if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


def autocast(facts):
    return torch.autocast("cpu", torch.bfloat16) if facts.precision == "bf16" else contextlib.nullcontext()


def language_run(facts, config, tokens=300):
    """(model, a run of the language model over two rows, one of them padded)."""
    model = build(config, facts)
    if facts.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kind = torch.bfloat16 if facts.precision == "bf16" and facts.lora_r else torch.float32
    states = torch.randn(2, tokens, config.text_config.hidden_size, dtype=kind, requires_grad=True)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :20] = 0
    return (
        model,
        lambda: (
            model.model.language_model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state
        ),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora_r", [8, None])
def test_language_model_keeps_what_is_estimated(byte_masks, lora_r, precision):
    """The saved tensors of a forward, each storage once, within a tenth."""
    config, facts = wide_config(), replace(FACTS, lora_r=lora_r, precision=precision, checkpointing=False)
    model, run = language_run(facts, config)
    weights = {p.numel() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().nbytes() // tensor.itemsize not in weights:  # nor a weight's copy in bfloat16
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with autocast(facts), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    real = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert kept.requires_grad
    assert 600 * language_bytes_per_token(config, facts) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_r", [8, None])
def test_language_model_peaks_where_it_is_estimated(byte_masks, lora_r, checkpointing, family):
    """Forward and backward in bfloat16, without the gradients: at most a sixth too little, a half too much."""
    config, facts = wide_config(family), replace(FACTS, lora_r=lora_r, precision="bf16", checkpointing=checkpointing)
    model, run = language_run(facts, config)
    with LiveBytes() as live:
        with autocast(facts):
            states = run()
        states.float().sum().backward()
    real = live.peak - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert 0.85 < 600 * language_bytes_per_token(config, facts) / real < 1.5


def test_checkpointing_and_length_change_the_activations():
    config = wide_config()
    short, long = (replace(FACTS, max_text_tokens=count) for count in (100, 1000))
    model = meta_model(config, FACTS)
    assert memory_per_gpu(model, short)["language model"] < memory_per_gpu(model, long)["language model"]
    plain = replace(FACTS, checkpointing=False)
    assert language_bytes_per_token(config, plain) > 2 * language_bytes_per_token(config, FACTS)


def test_mask_decoder_keeps_what_is_estimated():
    """In float32, never too little: the CPU keeps no attention scores where the meta device does.  Within a tenth."""
    model = build(tiny_config(), FULL)
    with torch.no_grad():
        features = model.encode_pictures(torch.randn(1, 3, 64, 64))
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masks = model.decode_masks(torch.randn(1, 32, requires_grad=True), features, [0])
    real = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert masks.mask_logits.requires_grad
    assert real <= mask_bytes(meta_model(tiny_config(), FULL)) < 1.1 * real


def test_frozen_encoders_peak_where_it_is_estimated():
    """No gradient, float32: between the true peak and twice that."""
    config = tiny_config()
    model = PerceptioForConditionalGeneration(config)
    for estimated, run in (
        (sam_bytes_per_picture(config, 4), lambda: model.encode_pictures(torch.zeros(1, 3, 64, 64))),
        (vision_bytes_per_tile(config, FACTS), lambda: model.model.vision_tower(torch.zeros(1, 3, 32, 32))),
    ):
        with torch.no_grad(), LiveBytes() as live:
            run()
        assert 1 <= estimated / live.peak < 2


def test_cached_features_need_no_encoder():
    model, cached = meta_model(tiny_config(), FACTS), replace(FACTS, sam_cached=True)
    assert memory_per_gpu(model, cached)["SAM2 encoder"] == 0 < memory_per_gpu(model, FACTS)["SAM2 encoder"]
    assert estimating.flops_per_sample(model, cached)["SAM2 encoder"] == 0


# Operations


def real_flops(config, facts, tokens):
    """Operations of one sample, forward and backward, with every score of the attention computed."""
    model = build(config, facts, eager=True)
    if facts.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.full((1, round(tokens["total"])), 20)
    ids[:, : round(tokens["picture"])] = config.image_token_id
    pictures = torch.randn(int(facts.tiles), 3, *config.vision_config.image_size)
    rows = config.text_config.vocab_size
    head = next(p for p in model.parameters() if p.shape[0] == rows)  # the embeddings, which are tied to the output
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            features = model.encode_pictures(torch.randn(1, 3, 64, 64))
        if not facts.train_vision:
            model.model.vision_tower.requires_grad_(False)
        states = model.model(input_ids=ids, pixel_values=pictures, use_cache=False).last_hidden_state[0]
        logits = states[-round(tokens["learned"]) :] @ head.T
        masks = model.decode_masks(states[-1:], features, [0])
        codes = config.depth_config.num_codes
        latents = model.depth_model.soft_merge(logits[None, : config.span_length, :codes])
        depth = model.depth_model.decode(latents)
        total = logits.sum() + masks.mask_logits.sum() + masks.mask_scores.sum() + masks.object_scores.sum()
        (total + depth.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("lora_r", "train_vision"), [(8, False), (None, False), (None, True)])
def test_operations_are_those_of_a_step(lora_r, train_vision, checkpointing):
    """Within a twentieth, of which checkpointing takes the most: it stops short of what nobody needs again."""
    config = wide_config()
    facts = RunFacts(
        steps=1, lora_r=lora_r, train_vision=train_vision, checkpointing=checkpointing, precision="fp32", tiles=3,
        text_tokens=200, answer_tokens=100, mask_share=1, masks=1, depth_share=1,
    )  # fmt: skip
    found = estimate(config, facts)
    assert sum(found.flops.values()) == pytest.approx(real_flops(config, facts, found.tokens), rel=0.05)


def test_hours_follow_the_gpu_and_the_length():
    base = replace(FACTS, precision="bf16", gpu="A100-80GB")
    hours = gpu_hours(1e12, base)
    assert hours == pytest.approx(10 * 16 / (312 * 0.35) / 3600)
    assert gpu_hours(1e12, replace(base, gpu="H100")) == pytest.approx(hours * 312 / 989)
    assert gpu_hours(1e12, replace(base, steps=20)) == pytest.approx(2 * hours)
    assert gpu_hours(1e12, replace(base, utilisation=0.7)) == pytest.approx(hours / 2)
    assert gpu_hours(1e12, replace(base, precision="fp32")) == pytest.approx(hours * 2)
    samples = replace(base, steps=None, samples=10 * 16 - 3)
    assert samples.run_steps == 10 and gpu_hours(1e12, samples) == hours
    found = estimate(tiny_config(), base)
    assert found.gpu_hours == gpu_hours(sum(found.flops.values()), base) == 4 * found.hours


def test_tokens_of_a_sample():
    facts = replace(FACTS, tiles=2, text_tokens=30, answer_tokens=10, mask_share=0.5, masks=2, depth_share=0.5)
    tokens = count_tokens(tiny_config(), facts)
    assert (tokens["picture"], tokens["span"], tokens["seg"]) == (32, 5.5, 1)
    assert (tokens["total"], tokens["learned"]) == (68.5, 16.5)


# Words


def test_report_says_that_it_is_an_estimate_and_adds_up():
    facts = replace(FACTS, precision="bf16", gpu="RTX4090")
    text, values = report(tiny_config(), facts), as_dict(tiny_config(), facts)
    assert text.startswith("An estimate, not a measurement") and "Assumed:" in text and "35%" in text
    assert f"{values['memory_gib']['total']:.2f}" in text and "fits in the 24 GB of one RTX4090" in text
    assert f"{sum(count['total'] for count in values['parameters'].values()):,}" in text
    assert max(map(len, text.splitlines())) < 120
    memory = {item: size for item, size in values["memory_gib"].items() if item != "total"}
    assert sum(memory.values()) == pytest.approx(values["memory_gib"]["total"])
    assert json.loads(json.dumps(values)) == values


def test_report_says_where_a_run_does_not_fit():
    config = layout_blueprint("8b").config
    facts = RunFacts(steps=1, lora_r=None, gpu="A100-80GB")
    assert "does not fit in the 80 GB" in report(config, facts)
    parted = replace(facts, sharding="fsdp2")
    assert "That fits" in report(config, parted)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpu": "H1000"}, "`gpu` is 'H1000', expected one of"),
        ({"sharding": "zero2"}, "`sharding` is 'zero2'"),
        ({"precision": "int8"}, "`precision` is 'int8'"),
        ({"samples": 5}, "expected one of them"),
        ({"steps": None}, "expected one of them"),
        ({"world_size": 0}, "`world_size` is 0, expected a whole number from 1"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5, expected a whole number"),
        ({"utilisation": 0.0}, "`utilisation` is 0.0"),
        ({"mask_share": 1.5}, "`mask_share` is 1.5, expected a number from 0 to 1"),
        ({"answer_tokens": 1000.0}, "expected at most `text_tokens`"),
        ({"lora_r": None, "base_4bit": True}, "4-bit weights take no gradient"),
        ({"train_vision": True}, "an adapter leaves the tower frozen"),
    ],
)
def test_facts_that_cannot_be_are_named(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(FACTS, **wrong)


def test_every_gpu_of_the_table_has_a_speed_and_a_memory():
    for gpu, (_, memory) in GPUS.items():
        assert 1e-6 < gpu_hours(1e12, replace(FACTS, gpu=gpu)) < 1e-1 and 10 < memory < 300
