"""One model, however it is loaded, saved, sped up or adapted: the same numbers."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from perceptio import PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio.hub.tiny import tiny_config

# Runs in a process of its own.  With "remote" the package cannot be imported: only the folder's code is there.
CHILD = """
import importlib.abc, json, sys
import torch
way, folder, resaved, picture = sys.argv[1:]
if way == "remote":
    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "perceptio":
                raise ModuleNotFoundError("perceptio is not installed here")
    sys.meta_path.insert(0, Blocker())
else:
    import perceptio
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
trust = {"trust_remote_code": way == "remote"}
model = AutoModel.from_pretrained(folder, **trust).eval()
processor = AutoProcessor.from_pretrained(folder, **trust)
assert type(model).__module__.startswith("perceptio." if way == "installed" else "transformers_modules.")
parts = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "What?"}]
chat = [{"role": "user", "content": parts}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
output = model.perceive(**inputs, max_new_tokens=16)
see = pipeline("perceptio", model=folder, **(trust if way == "remote" else {"trust_remote_code": True}))
answer = see(image=picture, text="What?", max_new_tokens=16)
text = pipeline("image-text-to-text", model=model, processor=processor)(text=chat, max_new_tokens=16,
                                                                        return_full_text=False)
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
print("RESULT" + json.dumps({
    "sequences": output.sequences.tolist(), "masks": output.mask_logits.tolist(), "depth": output.depth.tolist(),
    "answer": answer["generated_text"], "codes": answer["depth_codes"], "text": text[0]["generated_text"],
}))
"""


def in_a_fresh_process(way: str, folder: Path, work: Path, picture: Path) -> dict:
    environment = {**os.environ, "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), way, str(folder), str(work / "resaved"), str(picture)]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULT")[1])


@pytest.fixture
def photo(picture, tmp_path) -> Path:
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def load(folder, **kwargs):
    return PerceptioForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


def inputs_of(folder, *pictures, perception=None) -> dict:
    processor = PerceptioProcessor.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": "What?" * (i + 1)}]}]
        for i, p in enumerate(pictures)
    ]
    return processor.apply_chat_template(
        chats, perception=perception, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


def assert_same(left, right, tolerance: float = 1e-4) -> None:
    assert torch.equal(left.sequences, right.sequences)
    torch.testing.assert_close(left.mask_logits, right.mask_logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(left.depth, right.depth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("family", "way"), [("qwen2", "remote"), ("llama", "remote"), ("qwen2", "installed")])
def test_a_fresh_process_gives_the_same_numbers_as_remote_code_and_as_package(
    family, way, tiny_folder, photo, picture, tmp_path
):
    """And what it saves again is a whole folder, from which yet another fresh process loads."""
    folder = tiny_folder(family)
    expected = load(folder).perceive(**inputs_of(folder, picture), max_new_tokens=16)
    found = in_a_fresh_process(way, folder, tmp_path, photo)
    assert found["sequences"] == expected.sequences.tolist()
    torch.testing.assert_close(torch.tensor(found["masks"]), expected.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found["depth"]), expected.depth, rtol=1e-4, atol=1e-4)
    assert found["codes"] == expected.depth_codes[0].tolist()
    if family == "qwen2" and way == "remote":
        second = tmp_path / "second"
        second.mkdir()
        assert in_a_fresh_process("remote", tmp_path / "resaved", second, photo) == found


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_the_auto_classes_give_the_documented_class_with_every_weight(auto, tiny_folder):
    model, report = auto.from_pretrained(tiny_folder(), output_loading_info=True)
    assert type(model) is PerceptioForConditionalGeneration
    copies = {name for name in sys.modules if name.endswith(".modeling_perceptio")}
    assert {name for name in copies if not name.startswith("transformers_modules")} == {"perceptio.modeling_perceptio"}
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(AutoProcessor.from_pretrained(tiny_folder())) is PerceptioProcessor
    assert AutoConfig.from_pretrained(tiny_folder()).model_type == "perceptio"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree(attention, tiny_folder, picture):
    inputs = inputs_of(tiny_folder(), picture, picture.rotate(90, expand=True), perception=["seg+depth", "seg"])
    model = load(tiny_folder(), attn_implementation=attention)
    assert model.config.text_config._attn_implementation == attention
    assert_same(load(tiny_folder()).perceive(**inputs, max_new_tokens=16), model.perceive(**inputs, max_new_tokens=16))


@pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_caches_agree(kwargs, tiny_folder, picture):
    inputs, model = inputs_of(tiny_folder(), picture), load(tiny_folder())
    assert_same(model.perceive(**inputs, max_new_tokens=16), model.perceive(**inputs, max_new_tokens=16, **kwargs))


def test_a_batch_equals_its_rows(tiny_folder, picture):
    model, pictures = load(tiny_folder()), [picture, picture.rotate(90, expand=True), picture.resize((40, 40))]
    batch = model.perceive(**inputs_of(tiny_folder(), *pictures, perception="depth"), max_new_tokens=14)
    for row in range(3):
        chat_inputs = inputs_of(tiny_folder(), *pictures, perception="depth")
        used = chat_inputs["attention_mask"][row].bool()
        counts = (chat_inputs["input_ids"] == model.config.image_token_id).sum(-1) // 16
        start = int(counts[:row].sum())
        alone = model.perceive(
            input_ids=chat_inputs["input_ids"][row : row + 1, used],
            attention_mask=torch.ones(1, int(used.sum()), dtype=torch.long),
            pixel_values=chat_inputs["pixel_values"][start : start + int(counts[row])],
            max_new_tokens=14,
        )
        torch.testing.assert_close(batch.depth[row], alone.depth[0], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_folder, picture):
    inputs = inputs_of(tiny_folder(), picture, perception="none")
    gradients = []
    for checkpointing in (False, True):
        model = load(tiny_folder()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_decoding_step_compiles_whole(tiny_folder, picture):
    """Slow: the compiler takes half a minute.  fullgraph raises at the first break in the graph."""
    inputs, model = inputs_of(tiny_folder(), picture), load(tiny_folder())
    expected = model.perceive(**inputs, max_new_tokens=14)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_same(expected, model.perceive(**inputs, max_new_tokens=14, cache_implementation="static"))


def test_adapters_load_merge_and_come_back(tiny_folder, picture, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = inputs_of(tiny_folder(), picture)
    targets = r"model\.language_model\..*\.(q_proj|v_proj)"
    adapted = peft.get_peft_model(
        load(tiny_folder()), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    )
    with torch.no_grad():
        expected = adapted.base_model.model.perceive(**inputs, max_new_tokens=14)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = load(tiny_folder()).perceive(**inputs, max_new_tokens=14)
    assert not torch.allclose(plain.mask_logits, expected.mask_logits)
    loaded = load(tiny_folder())
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_same(expected, loaded.perceive(**inputs, max_new_tokens=14))
    again = peft.PeftModel.from_pretrained(load(tiny_folder()), tmp_path / "adapter").merge_and_unload()
    again.save_pretrained(tmp_path / "merged")
    assert_same(expected, load(tmp_path / "merged").perceive(**inputs, max_new_tokens=14))


def test_weight_only_quantization_reaches_the_language_model_alone(tiny_folder, picture):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = load(tiny_folder(), quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    kinds = {name: type(parameter.data).__name__ for name, parameter in model.named_parameters()}
    quantized = {name for name, kind in kinds.items() if kind not in ("Tensor", "Parameter")}
    assert quantized and all(name.startswith("model.language_model.") for name in quantized)
    output = model.perceive(**inputs_of(tiny_folder(), picture), max_new_tokens=14)
    assert torch.isfinite(output.mask_logits).all() and output.depth.shape == (1, 24, 24)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_reaches_the_language_model_alone(bits, tmp_path):
    """At width 128: 4-bit blocks of 64 do not fit the matrices of the smallest model."""
    pytest.importorskip("bitsandbytes")
    text = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    config = tiny_config(text_config=AutoConfig.for_model("qwen2", **text))
    PerceptioForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=transformers.BitsAndBytesConfig(**{bits: True}))
    kinds = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    quantized = {name for name, kind in kinds.items() if kind in ("Int8Params", "Params4bit")}
    assert len(quantized) == 14 and all(name.startswith("model.language_model.layers.") for name in quantized)
    ids = torch.tensor([[5, 6, config.seg_token_id, config.depth_start_token_id]])
    output = model.perceive(
        input_ids=ids, attention_mask=torch.ones_like(ids), sam_pixel_values=torch.zeros(1, 3, 64, 64),
        max_new_tokens=14, pad_token_id=0,
    )  # fmt: skip
    assert torch.isfinite(output.mask_logits).all() and output.depth.shape == (1, 24, 24)


def test_a_streamer_gives_the_answer_only(tiny_folder, picture):
    from threading import Thread

    from transformers import TextIteratorStreamer

    model, processor = load(tiny_folder()), PerceptioProcessor.from_pretrained(tiny_folder())
    inputs = inputs_of(tiny_folder(), picture)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    results = []
    thread = Thread(target=lambda: results.append(model.perceive(**inputs, max_new_tokens=20, streamer=streamer)))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    span = processor.parse(results[0])[0]
    assert streamed == span.answer and span.depth_codes is not None and "<d_" not in streamed


def test_sampling_with_a_seed_repeats(tiny_folder, picture):
    model, inputs, rows = load(tiny_folder()), inputs_of(tiny_folder(), picture), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rows.append(model.perceive(**inputs, max_new_tokens=20, do_sample=True, temperature=2.0).sequences.tolist())
    assert rows[0] == rows[1] != rows[2]
