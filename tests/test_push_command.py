"""`perceptio push`: what arrives on the Hub, what a stranger has of it, what is taken up again, what is refused."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_samples import Oracle, write_world
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from safetensors.torch import save_file
from shard_samples import folder_of

from perceptio import PerceptioForConditionalGeneration
from perceptio.cli import main
from perceptio.evaluation.benchmark import Figure, open_benchmark
from perceptio.evaluation.command import model_hash
from perceptio.evaluation.run import Settings, run_benchmark
from perceptio.files_perceptio import CODE_FILES
from perceptio.hub.manifest import scan_pickles, verify_manifest

TOKEN, OTHER = "hf_Mine0123456789", "hf_Unknown0123456789"
FREE = ["--license", "apache-2.0"]

# A stranger has the libraries alone.  Loads from the Hub, and once more without it.
STRANGER = """
import importlib.abc, json, sys, time
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptio":
            raise ModuleNotFoundError("perceptio is not installed here")
sys.meta_path.insert(0, Absent())
import torch
from datasets import load_dataset
from huggingface_hub import constants, snapshot_download
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
name, data, revision = sys.argv[1:]
there = {"revision": revision}
begun = time.perf_counter()
try:
    AutoModelForImageTextToText.from_pretrained(name, **there)
    refusal = None
except Exception as error:
    refusal = str(error)
seconds = time.perf_counter() - begun
trust = {"trust_remote_code": True, **there}
model = AutoModelForImageTextToText.from_pretrained(name, **trust).eval()
found = {"folder": snapshot_download(name, **there), "refusal": refusal, "seconds": seconds}
found["class"] = type(AutoModel.from_pretrained(name, **trust)).__module__
found["processor"] = type(AutoProcessor.from_pretrained(name, **trust)).__name__
found["logits"] = model(input_ids=torch.arange(1, 21)[None]).logits[0, -1].tolist()
see = pipeline("perceptio", model=name, **trust)
answer = see(image=Image.new("RGB", (96, 64), "red"), text="What?", max_new_tokens=14)
found["codes"] = answer["depth_codes"]
Image.new("RGB", (96, 64), "red").save("photo.jpg")
lines = open(found["folder"] + "/README.md", encoding="utf-8").read().split("```python\\n")[1].split("```")[0]
exec(lines.replace("trust_remote_code=True", "trust_remote_code=True, revision=revision"), scope := {**there})
found["card"] = [scope["result"]["depth"].size, tuple(scope["result"]["predicted_depth"].shape)]
rows = load_dataset(data, split="train", **there)
found["rows"] = [len(rows), sorted(rows.features), rows[0]["image"].size, rows[0]["messages"][0]["content"]]
found["streamed"] = next(iter(load_dataset(data, split="train", streaming=True, **there)))["id"]
constants.HF_HUB_OFFLINE = True
print("ONLINE", flush=True)
again = AutoModelForImageTextToText.from_pretrained(name, local_files_only=True, **trust).eval()
found["again"] = again(input_ids=torch.arange(1, 21)[None]).logits[0, -1].tolist()
print("RESULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer({TOKEN: "me"}) as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path_factory.mktemp("home"), TOKEN)
        yield server


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder(), tmp_path / "model")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_folder):
    """results.json of `perceptio eval world`, as if this model had been asked."""
    place = tmp_path_factory.mktemp("measured")
    write_world(place / "scenes", 2, ("test",))

    class Pipe:
        model = type("Named", (), {"name_or_path": str(tiny_folder())})

    settings, facts = Settings(split="test", batch_size=4), {"model": model_hash(Pipe)}
    run_benchmark(open_benchmark("world"), Oracle(), place / "scenes", place / "eval", settings, facts)
    return place / "eval" / "results.json"


def space_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\ntitle: See\nsdk: gradio\napp_file: app.py\nlicense: apache-2.0\n---\nSee.\n"
    )
    (folder / "app.py").write_text("print('hello')\n")
    (folder / "requirements.txt").write_text("perceptio\n")
    return folder


def push(*words) -> int:
    return main(["push", *map(str, words)])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(hub, before: int) -> list[str]:
    return [
        request.split()[0]
        for request, _ in hub.requests[before:]
        if request.startswith("PUT") or "/commit/" in request
    ]


def test_a_dry_run_does_all_but_the_upload(hub, model, capsys):
    before, files = len(hub.requests), content(model)
    (model / "optimizer_state.txt").write_text("left over")
    assert push(model, "me/dry", "--dry-run", *FREE, "--max-shard-size", "300KB") == 0
    shown = capsys.readouterr().out
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ +([\d,]+)  (.+)$", shown, re.M)}
    weights = [name for name in listed if name.endswith(".safetensors")]
    assert len(weights) == 3 and max(listed[name] for name in weights) < 340_000
    assert {*CODE_FILES, "LICENSE", "README.md", "chat_template.jinja", "manifest.json"} <= set(listed)
    assert listed["tokenizer.json"] == len(files["tokenizer.json"])
    assert f"{len(listed)} files, {sum(listed.values()) / 1e6:,.1f} MB, for the model me/dry" in shown
    assert "left out: optimizer_state.txt\n" in shown
    assert "without this package: model PerceptioForConditionalGeneration, processor PerceptioProcessor" in shown
    assert len(hub.requests) == before and ("models", "me/dry") not in hub.repositories
    (model / "optimizer_state.txt").unlink()
    assert content(model) == files and [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_stranger_loads_what_was_pushed(hub, tiny_folder, measured, tmp_path):
    """Model and data set, from a branch, by every way in; a second time without the Hub."""
    shards, branch = folder_of(tmp_path / "scenes", 12), ["--revision", "v1"]
    benchmark = ["--results", measured, "--benchmark", "world=me/scenes"]
    size = ["--max-shard-size", "300KB"]
    assert push(tiny_folder(), "me/see", *FREE, *branch, *benchmark, *size, "--no-verify") == 0
    assert push(shards, "me/scenes", *branch) == 0
    assert hub.files("me/see") == hub.files("me/scenes", kind="datasets") == {}  # that is `main`
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER, "me/see", "me/scenes", "v1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        online, requests = "", 0
        for line in process.stdout:
            online += line
            requests = len(hub.requests) if "ONLINE" in line else requests
        assert process.wait(100) == 0, process.stderr.read()[-3000:]
    found = json.loads(online.split("RESULT")[1])
    assert requests == len(hub.requests)  # the second time nothing was asked
    pulled = Path(found["folder"])
    assert content(pulled) == hub.files("me/see", "v1") and verify_manifest(pulled) == scan_pickles(pulled) == []
    assert "trust_remote_code" in found["refusal"] and found["seconds"] < 10
    assert found["class"].startswith("transformers_modules.") and found["processor"] == "PerceptioProcessor"
    ours = PerceptioForConditionalGeneration.from_pretrained(tiny_folder()).eval()
    expected = ours(input_ids=torch.arange(1, 21)[None]).logits[0, -1].tolist()
    assert found["logits"] == pytest.approx(expected, abs=1e-5) and found["again"] == found["logits"]
    assert len(found["codes"]) == ours.config.span_length and found["card"] == [[96, 64], [64, 96]]
    assert found["rows"][0] == 12 and {"image", "masks", "depth", "mask_preview"} <= set(found["rows"][1])
    assert found["rows"][2:] == [[64, 48], "Where is thing 0?"] and found["streamed"] == "row-0000"


def test_the_figures_stand_in_the_tables_of_the_hub(hub, tiny_folder, measured):
    """The present form and the older one, and the text: the same numbers, all of them those of the file."""
    assert push(tiny_folder(), "me/figures", *FREE, "--results", measured, "--benchmark", "world=me/scenes",
                "--no-verify") == 0  # fmt: skip
    files, results = hub.files("me/figures"), json.loads(measured.read_text("utf-8"))
    values = [figure["value"] for figure in results["figures"]]
    assert json.loads(files["evaluation/world-test.json"]) == results and len(values) > 4
    entries = yaml.safe_load(files[".eval_results/world-test.yaml"])
    assert [entry["value"] for entry in entries] == values
    assert entries[0]["dataset"] == {"id": "me/scenes", "task_id": "test_answers"}
    assert entries[0]["source"]["url"].endswith("/me/figures/blob/main/evaluation/world-test.json")
    assert entries[0]["notes"].startswith("perceptio eval world --model me/figures --split test")
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    assert [result.metric_value for result in card.data.eval_results] == values
    rows = [
        row.split(" | ")
        for row in re.findall(r"^\| (.*%? .*) \|$", card.text.split("## Numbers")[1].split("\n## ")[0], re.M)
    ]
    assert rows[2:] == [list(Figure(**figure).cells()) for figure in results["figures"]]
    assert card.data.license == "apache-2.0" and "untrained" in card.text and 'model="me/figures"' in card.text


def test_figures_with_other_codes_are_compared_and_not_the_models_own(hub, tiny_folder, measured, tmp_path, capsys):
    """Beside its own in the card; in the tables of the Hub its own alone."""
    other = json.loads(measured.read_text("utf-8"))
    other["settings"]["depth_codes"] = "random"
    other["figures"] = [{**figure, "value": 12.25, "low": 10.0, "high": 20.0} for figure in other["figures"]]
    (tmp_path / "random.json").write_text(json.dumps(other))
    words = [*FREE, "--results", measured, "--results", tmp_path / "random.json", "--benchmark", "world=me/scenes"]
    assert push(tiny_folder(), "me/codes", *words, "--no-verify") == 0
    files, results = hub.files("me/codes"), json.loads(measured.read_text("utf-8"))
    assert json.loads(files["evaluation/world-test.json"]) == results
    assert json.loads(files["evaluation/world-test-random-codes.json"]) == other
    assert [name for name in files if name.startswith(".eval_results/")] == [".eval_results/world-test.yaml"]
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    assert [r.metric_value for r in card.data.eval_results] == [figure["value"] for figure in results["figures"]]
    numbers = card.text.split("## Numbers")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", numbers, re.M)]
    assert rows[0] == ["figure", "its own", "random"] and "--depth-codes own" in numbers
    answers = [Figure(**f).cells()[:2] for f in results["figures"] if "answers" in f["name"]]
    assert answers and all([name, value, "12.2%"] in rows for name, value in answers)
    assert not any("delta1" in row[0] for row in rows)
    shutil.copy(tmp_path / "random.json", tmp_path / "again.json")
    assert push(tiny_folder(), "me/codes", *words, "--results", tmp_path / "again.json", "--no-verify") == 2
    assert "answer the same questions" in capsys.readouterr().err


def test_a_space_arrives_as_it_is(hub, tmp_path):
    folder = space_in(tmp_path / "demo")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.pyc").write_bytes(b"x")
    assert push(folder, "me/demo", "--private") == 0
    files, repository = hub.files("me/demo", kind="spaces"), hub.repositories["spaces", "me/demo"]
    assert set(files) == {"README.md", "app.py", "requirements.txt", "LICENSE"} and repository.private
    assert repository.settings["sdk"] == "gradio" and files["app.py"] == (folder / "app.py").read_bytes()


def test_an_adapter_needs_its_base_on_the_hub(hub, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert push(tmp_path / "adapter", "me/adapter", *FREE) == 2
    assert "nobody else has that folder" in capsys.readouterr().err
    settings.write_text(json.dumps({"base_model_name_or_path": "me/see"}))
    assert push(tmp_path / "adapter", "me/adapter", *FREE) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "LICENSE"} <= set(hub.files("me/adapter"))


@pytest.mark.parametrize("how", [500, "reset"])
def test_an_upload_that_breaks_off_is_taken_up(hub, model, capsys, how):
    """At the commit, after the weights: they are not sent a second time."""
    name = f"me/broken-{how}"
    weights = PerceptioForConditionalGeneration.from_pretrained(model)
    weights.model.language_model.norm.weight.data += len(name)
    weights.save_pretrained(model)
    (model / "manifest.json").unlink()
    hub.fail_uploads(2, 1, how)
    assert push(model, name, *FREE, "--no-verify") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("perceptio: ") and "run the same command again" in said and hub.files(name) == {}
    before = len(hub.requests)
    assert push(model, name, *FREE, "--no-verify") == 0
    assert sent(hub, before) == ["POST"] and hub.files(name)["model.safetensors"]
    assert hub.files(name)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    commit = hub.repositories["models", name].at("main").id
    assert push(model, name, *FREE, "--no-verify") == 0
    assert hub.repositories["models", name].at("main").files == hub.repositories["models", name].at(commit).files


def test_a_connection_that_is_cut_in_the_middle_of_the_weights(hub, model):
    weights = PerceptioForConditionalGeneration.from_pretrained(model)
    weights.model.language_model.norm.weight.data += 0.25
    weights.save_pretrained(model)
    (model / "manifest.json").unlink()
    before = len(hub.requests)
    hub.fail_uploads(1, 1, "reset")
    assert push(model, "me/cut", *FREE, "--no-verify") == 0
    statuses = [status for request, status in hub.requests[before:] if request.startswith("PUT")]
    assert statuses == ["reset", 200]
    assert hub.files("me/cut")["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_weights_of_an_earlier_push_are_removed(hub, model):
    """An index and files that disagree do not load."""
    assert push(model, "me/again", *FREE, "--no-verify", "--max-shard-size", "300KB") == 0
    assert "model-00003-of-00003.safetensors" in hub.files("me/again")
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_config.json").write_text("{}")
    HfApi(hub.endpoint, TOKEN).upload_folder(repo_id="me/again", folder_path=model / "adapter")
    assert push(model, "me/again", *FREE, "--no-verify") == 0
    assert [name for name in hub.files("me/again") if "safetensors" in name] == ["model.safetensors"]
    assert "adapter_config.json" not in hub.files("me/again")  # it would be taken for the model


def test_two_pushes_at_once(hub, model, tmp_path):
    codes = []
    threads = [
        threading.Thread(target=lambda: codes.append(push(model, "me/both", *FREE, "--no-verify"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pulled = Path(HfApi(hub.endpoint).snapshot_download("me/both", local_dir=tmp_path / "both"))
    assert codes == [0, 0] and verify_manifest(pulled) == []


@pytest.mark.parametrize(("token", "name", "status"), [(OTHER, "me/mine", 401), (TOKEN, "them/theirs", 403)])
def test_a_refused_token_is_one_line(hub, model, tmp_path, monkeypatch, capsys, token, name, status):
    hub.use(monkeypatch, tmp_path / "home", token)
    assert push(model, name, *FREE, "--no-verify") == 2
    out, error = capsys.readouterr()
    said = [line for line in error.splitlines() if line.startswith("perceptio: ")]
    assert len(said) == 1 and f"refuses the token with {status}: log in with `hf auth login`" in said[0]
    assert token not in out + error and ("models", name) not in hub.repositories


def test_nothing_listens(model, monkeypatch, capsys, tmp_path, hub):
    hub.use(monkeypatch, tmp_path / "home", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(model, "me/nowhere", *FREE, "--no-verify") == 2
    assert "no connection to http://127.0.0.1:9" in capsys.readouterr().err


def test_a_server_without_xet_is_told_from_one_with(tiny_folder, tmp_path, capsys):
    """With hf-xet the client does not ask which storage there is; a server that has none never sees the weights."""
    with HubServer({TOKEN: "me"}) as plain, pytest.MonkeyPatch.context() as patch:
        plain.use(patch, tmp_path / "home", TOKEN)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        assert push(tiny_folder(), "me/xet", *FREE, "--no-verify") == 2
        assert f"{plain.endpoint} has no Xet storage" in (said := capsys.readouterr().err)
        assert "set HF_HUB_DISABLE_XET=1" in said and plain.files("me/xet") == {}
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        assert push(tiny_folder(), "me/xet", *FREE, "--no-verify") == 0
        weights = (tiny_folder() / "model.safetensors").read_bytes()
        assert plain.files("me/xet")["model.safetensors"] == weights
    with HubServer({TOKEN: "me"}, tmp_path / "xet") as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path / "home", TOKEN)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        assert push(tiny_folder(), "me/xet", *FREE, "--no-verify") == 0
        stored = server.repositories["models", "me/xet"].at("main").files["model.safetensors"]
        assert stored.size == len(weights) and not [r for r, _ in server.requests if r.startswith("PUT")]
        assert sum(path.stat().st_size for path in (tmp_path / "xet").rglob("*") if path.is_file()) > len(weights) / 2


def test_what_a_broken_download_left_is_not_taken_for_the_file(hub, model, tmp_path):
    assert push(model, "me/half", *FREE, "--no-verify") == 0
    cache = tmp_path / "cache"
    link = Path(hf_hub_download("me/half", "model.safetensors", cache_dir=cache, endpoint=hub.endpoint))
    blob = link.resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"0" * 9999)
    link.unlink()
    folder = Path(HfApi(hub.endpoint).snapshot_download("me/half", cache_dir=cache))
    assert verify_manifest(folder) == [] and content(folder) == hub.files("me/half")


# What is refused, before anything is sent

KEY = "-----BEGIN RSA " + "PRIVATE KEY-----"
LEAK = "hf_" + "Ab1" * 11 + "x"


def edit(name: str, old: str, new: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


def put(name: str, data: str | bytes):
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def own_words(text: str) -> str:
    return f"---\nlicense: mit\n---\n# Mine\n{text}\n"


MODEL_FAULTS = {
    "a pickle": (put("optimizer.pt", b"\x80\x02."), FREE, "optimizer.pt: .pt files can run code"),
    "a pickle by another name": (put("notes.txt", b"\x80\x04."), FREE, "notes.txt: opens like a pickle"),
    "a token": (put("README.md", own_words(LEAK)), [], "README.md, line 5: holds a token of the Hub"),
    "a token in a log": (put("log.jsonl", f'{{"step": 1}}\n{{"step": 2, "k": "{LEAK}"}}'), FREE, "log.jsonl, line 2"),
    "a key": (put("recipe.yaml", f"a: 1\nkey: {KEY}"), FREE, "recipe.yaml, line 2: holds a private key"),
    "the login": (put("README.md", own_words(TOKEN)), [], "holds the value of HF_TOKEN"),
    "a path": (put("recipe.yaml", f"data: {Path.home()}/pictures"), FREE, "the name of a folder of this machine"),
    "no licence": (lambda folder: None, [], "states no licence: pass --license"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), FREE, "has no processor_config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), FREE, "holds no weights in safetensors"),
    "another model": (edit("config.json", 'e": "perceptio"', 'e": "llama"'), FREE, "is 'llama', expected 'perceptio'"),
    "a flipped bit": (flip, FREE, "model.safetensors: has the right size but other content"),
    "broken front matter": (put("README.md", "---\n: [\n---\n"), FREE, "the front matter of"),
    "an unknown fact": (put("card.json", '{"abuot": "x"}'), FREE, "holds `abuot`"),
    "facts that are none": (put("card.json", "[1]"), FREE, "card.json holds a list, expected one JSON object"),
    "made-up figures": (put("evaluation.json", '{"figures": [{"value": 1}]}'), FREE, "no result of `perceptio eval`"),
    "a bare name": (lambda folder: None, [*FREE, "NAME"], "REPO_ID is 'bare', expected owner/name"),
    "a benchmark of no data set": (lambda folder: None, [*FREE, "--benchmark", "world"], "`--benchmark` is 'world'"),
    "a size that is none": (lambda folder: None, [*FREE, "--max-shard-size", "big"], "`max_shard_size` is 'big'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_model_that_is_not_fit_is_not_sent(hub, model, capsys, fault):
    damage, words, said = MODEL_FAULTS[fault]
    damage(model)
    before, name = len(hub.requests), "bare" if "NAME" in words else "me/unfit"
    assert push(model, name, *(word for word in words if word != "NAME"), "--no-verify") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("perceptio: ") and said in error and LEAK not in error and TOKEN not in error
    assert len(hub.requests) == before and [path.name for path in model.parent.iterdir()] == ["model"]


def test_figures_of_another_model_are_refused(hub, model, measured, capsys):
    edit("generation_config.json", "{", '{"max_length": 99,')(model)
    (model / "manifest.json").unlink()
    assert push(model, "me/unfit", *FREE, "--results", measured, "--no-verify") == 2
    assert "was measured on the model" in capsys.readouterr().err


def test_what_a_stranger_cannot_load_is_not_sent(hub, model, capsys):
    edit("processor_config.json", "processing_perceptio.PerceptioProcessor", "processing_perceptio.Gone")(model)
    (model / "manifest.json").unlink()
    before = len(hub.requests)
    assert push(model, "me/unfit", *FREE) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a process without this package cannot use the repository" in said and "Gone" in said
    assert len(hub.requests) == before


def test_private_does_not_make_a_public_repository_so(hub, model, capsys):
    assert push(model, "me/open", *FREE, "--no-verify") == 0
    commit = hub.repositories["models", "me/open"].at("main").id
    assert push(model, "me/open", *FREE, "--no-verify", "--private") == 2
    assert "me/open is public already" in capsys.readouterr().err
    assert hub.repositories["models", "me/open"].at("main").id == commit


def no_data(folder: Path) -> None:
    next((folder / "data").iterdir()).write_bytes(b"PAR1")


OTHER_FAULTS = {
    "figures of a data set": ("dataset", lambda folder: None, "--results and --benchmark are for a whole model"),
    "a cut shard": ("dataset", no_data, "expected"),
    "a Space without a list": ("space", lambda folder: (folder / "requirements.txt").unlink(), "requirements.txt is"),
    "an app that is no Python": ("space", put("app.py", "def"), "app.py is no Python file"),
    "a Space without a title": ("space", edit("README.md", "title: See\n", ""), "has no `title`"),
    "a Space with a key": ("space", put("app.py", f"token = '{LEAK}'"), "app.py, line 1: holds a token of the Hub"),
    "a Space with its login": ("space", put(".env", "A=1"), None),
}  # fmt: skip


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_a_data_set_or_space_that_is_not_fit_is_not_sent(hub, tmp_path, capsys, fault):
    kind, damage, said = OTHER_FAULTS[fault]
    folder = space_in(tmp_path / "it") if kind == "space" else folder_of(tmp_path / "it", 4)
    damage(folder)
    before, name = len(hub.requests), f"me/{kind}-fault"
    if said is None:
        assert push(folder, name) == 0 and ".env" not in hub.files(name, kind=f"{kind}s")
        return
    words = ["--benchmark", "world=me/scenes"] if "figures" in fault else []
    assert push(folder, name, *words) == 2
    assert said in capsys.readouterr().err and len(hub.requests) == before


def test_a_secret_in_the_text_of_a_shard_is_found(hub, tmp_path, capsys):
    """It is compressed there, so that its bytes say nothing."""
    folder = folder_of(tmp_path / "scenes", 6, extra=json.dumps({"note": LEAK}))
    assert push(folder, "me/leak") == 2
    said = capsys.readouterr().err
    assert "train-00000-of-00001.parquet, line 1: holds a token of the Hub" in said and LEAK not in said


def test_rows_of_unknown_licence_need_one(hub, tmp_path, capsys):
    folder = folder_of(tmp_path / "scenes", 4, licence="unknown")
    assert push(folder, "me/unknown") == 2 and "rows of 'own' whose licence is unknown" in capsys.readouterr().err
    assert push(folder, "me/unknown", "--license", "cc-by-4.0", "--no-verify") == 0
    front = ModelCard(hub.files("me/unknown", kind="datasets")["README.md"].decode()).data
    assert front.license == "cc-by-4.0" and front.to_dict()["configs"][0]["data_files"][0]["split"] == "train"


def test_a_folder_of_nothing_is_named(tmp_path, capsys):
    assert push(tmp_path, "me/nothing") == 2 and "holds neither config.json" in capsys.readouterr().err
    assert push(tmp_path / "gone", "me/nothing") == 2 and "expected a folder" in capsys.readouterr().err


# Cards


def test_a_card_by_hand_is_kept_and_one_of_ours_written_anew(hub, model, capsys):
    """Training names the base in its card; that is known afterwards, too."""
    (model / "README.md").write_text(own_words("My own words."))
    (model / "LICENSE").write_text("MIT")
    assert push(model, "me/hand", "--no-verify") == 0
    files = hub.files("me/hand")
    assert files["README.md"].decode() == own_words("My own words.") and files["LICENSE"] == b"MIT"
    trained = "---\nbase_model: me/base\n---\n# A Perceptio, fine-tuned\n\nTrained from `me/base`.\n"
    (model / "README.md").write_text(trained)
    (model / "card.json").write_text('{"parts": {"language model": {"origin": "me/base", "licence": "mit"}}}')
    assert push(model, "me/hand", *FREE, "--no-verify") == 0
    files = hub.files("me/hand")
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    assert card.data.base_model == "me/base" and "Nothing was measured." in card.text
    assert re.search(r"\| language model \| [\d.]+ M \| me/base \| mit \|", card.text)
    assert re.search(r"\| SAM2 encoder \| [\d.]+ M \| not stated \| not stated \|", card.text)
    assert json.loads(files["card.json"])["base_model"] == "me/base"


def test_nothing_that_is_secret_was_ever_sent(hub, tmp_path):
    """After all of the above: neither a token nor a pickle nor the name of a folder of this machine."""
    sent_ever = hub.everything()
    assert sum(name.endswith(".safetensors") for name in sent_ever) > 10
    for name, data in sent_ever.items():
        assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")), name
        for secret in (TOKEN, OTHER, LEAK, KEY, str(tmp_path.parents[1]), f"{Path.home()}/"):
            assert secret.encode() not in data, (name, secret)
