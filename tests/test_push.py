"""The result on the Hub: what is pushed there, what a stranger has of it, and what a push that fails says."""

import inspect
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from training_samples import PLAIN, records, trainer_of

from perceptio import PerceptioPipeline
from perceptio.data.shards import write_shards
from perceptio.hub.manifest import PICKLE_STARTS, PICKLE_SUFFIXES, ZIP_START
from perceptio.train_sft import PerceptioSFTConfig, PerceptioSFTTrainer, main
from perceptio.training.result import save_result

ROOT = Path(__file__).parents[1]
TOKEN, OTHER = "hf_Mine0123456789", "hf_Unknown0123456789"
BASE = "me/base"


def seen(see) -> dict:
    """What a model makes of a picture and of a few ids, fit for JSON."""
    import hashlib

    import torch
    from PIL import Image

    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    answer = see(image=picture, text="Where is the red disc?", max_new_tokens=40)
    with torch.no_grad():
        logits = see.model(input_ids=torch.arange(1, 21)[None]).logits
    mask = hashlib.sha256(answer["mask"].tobytes()).hexdigest() if answer["mask"] else None
    found = {"text": answer["generated_text"], "codes": answer["depth_codes"], "mask": mask}
    return {**found, "logits": logits[0, -1, :50].tolist()}


PULL = f"""
import json, sys
from huggingface_hub import snapshot_download
from transformers import pipeline
from perceptio import PerceptioForConditionalGeneration, PerceptioPipeline

{inspect.getsource(seen)}
for name in sys.argv[1:]:
    folder = snapshot_download(name)
    kwargs = {{"attn_implementation": "eager"}}
    model = PerceptioForConditionalGeneration.from_pretrained(name, **kwargs)
    see = pipeline("perceptio", model=name, pipeline_class=PerceptioPipeline, model_kwargs=kwargs)
    by_class = PerceptioPipeline(model=model.eval(), processor=see.processor)
    found = {{"folder": folder, "pipeline": seen(see), "class": seen(by_class), "untrained": model.config.untrained}}
    print(json.dumps({{name: found}}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_folder):
    """With the base that adapters are trained on."""
    with HubServer({TOKEN: "me"}) as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path_factory.mktemp("home"), TOKEN)
        api = HfApi(server.endpoint)
        api.create_repo(BASE)
        api.upload_folder(repo_id=BASE, folder_path=tiny_folder())
        yield server


@pytest.fixture(scope="module")
def rows():
    return records(2)


def train(out, rows, model=BASE, **changes) -> PerceptioSFTTrainer:
    args = {"max_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "push_to_hub": True, **changes}
    args = PerceptioSFTConfig(str(out), **{**PLAIN, **args})
    trainer = PerceptioSFTTrainer(model, args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer


def alive(trainer) -> dict:
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    model.config.use_cache = True
    return seen(PerceptioPipeline(model=model.eval(), processor=trainer.processing_class))


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploads(hub, before: int = 0) -> list[str]:
    return [request for request, _ in hub.requests[before:] if request.startswith("PUT") or "/commit/" in request]


def test_the_server_is_a_hub_to_its_client(hub, tmp_path):
    """What other tests rely on: kinds, branches, trees, who may write, cut connections."""
    api, name = HfApi(hub.endpoint), "me/pictures"
    kind = {"repo_id": name, "repo_type": "dataset"}
    api.create_repo(**kind, private=True)
    (tmp_path / "data" / "a b").mkdir(parents=True)
    sent = {"README.md": b"# hello", "a b/more.bin": bytes(range(256)) * 4000, "empty": b""}
    for path, data in sent.items():
        (tmp_path / "data" / path).write_bytes(data)
    hub.fail_uploads(1, 1, "reset")
    first = api.upload_folder(**kind, folder_path=tmp_path / "data")
    assert [status for request, status in hub.requests if request.startswith("PUT")][-2:] == ["reset", 200]
    assert written(Path(api.snapshot_download(**kind))) == hub.files(name, kind="datasets") == sent
    api.create_branch(**kind, branch="more/x")
    api.upload_file(**kind, path_or_fileobj=b"1", path_in_repo="n/1.txt", revision="more/x")
    api.create_tag(**kind, tag="v1", revision="more/x")
    assert api.list_repo_files(**kind) == sorted(sent) and "n/1.txt" in api.list_repo_files(**kind, revision="v1")
    assert {entry.path for entry in api.list_repo_tree(**kind, revision="v1")} == {"README.md", "a b", "empty", "n"}
    assert [entry.path for entry in api.get_paths_info(**kind, paths=["a b/more.bin", "none"])] == ["a b/more.bin"]
    assert [commit.title for commit in api.list_repo_commits(**kind)][-1] == "initial commit"
    api.delete_folder(**kind, path_in_repo="a b")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(**kind, path_or_fileobj=b"1", path_in_repo="2.txt", parent_commit=first.oid)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(**kind, filename="a b/more.bin")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub.endpoint, False).repo_info(**kind)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(hub.endpoint, OTHER).whoami()
    api.delete_repo(**kind)
    assert not api.repo_exists(**kind)


def test_a_stranger_pulls_what_was_trained(hub, rows, tmp_path):
    """Adapter, merged and whole, each in a process that has never seen this machine's folders."""
    live = {}
    for name, changes in {
        "adapter": {"save_strategy": "steps", "save_steps": 1},
        "merged": {},
        "whole": {"full": True},
    }.items():
        before = len(hub.requests)
        trainer = train(tmp_path / name, rows, hub_model_id=f"me/{name}", **changes)
        assert uploads(hub, before) == [] and hub.files(f"me/{name}") == {}  # a checkpoint is no result
        if name == "merged":
            save_result(trainer, merge=True)
        commit = trainer.push_to_hub(commit_message="One step")
        live[name] = alive(trainer)
        assert commit.commit_url.startswith(f"{hub.endpoint}/me/{name}/commit/")
        assert hub.repositories["models", f"me/{name}"].at("main").title == "One step"
        assert hub.files(f"me/{name}") == written(tmp_path / name / "model")
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == BASE
    names = [f"me/{name}" for name in live]
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PULL, *names, BASE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pulled = {}
    for line in done.stdout.splitlines():
        pulled |= json.loads(line) if line.startswith("{") else {}
    base = pulled[BASE]["class"]
    for name, expected in live.items():
        found = pulled[f"me/{name}"]
        assert written(Path(found["folder"])) == hub.files(f"me/{name}") and not found["untrained"]
        for way in ("pipeline", "class"):
            assert {**found[way], "logits": None} == {**expected, "logits": None}, (name, way)
            assert found[way]["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-4)
        assert expected["logits"] != pytest.approx(base["logits"], rel=1e-2, abs=1e-2)


def test_the_command_pushes_and_leaks_nothing(hub, rows, tmp_path):
    """The token on the command line, a private repository, checkpoints and panels beside the result."""
    write_shards(rows, tmp_path / "scenes")
    arguments = {**PLAIN, "model": BASE, "data": tmp_path / "scenes", "eval_data": tmp_path / "scenes", "panels": 1,
                 "eval_split": "train", "output_dir": tmp_path / "run", "max_steps": 1, "save_strategy": "steps",
                 "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/run", "hub_private_repo": True,
                 "hub_token": TOKEN}  # fmt: skip
    command = [sys.executable, str(ROOT / "train_sft.py"), *spell(arguments)]
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.repositories["models", "me/run"].private and (tmp_path / "run" / "checkpoint-1").is_dir()
    assert hub.files("me/run") == written(tmp_path / "run" / "model")
    assert TOKEN not in done.stdout + done.stderr
    assert_no_secrets(hub, tmp_path)


def assert_no_secrets(hub, tmp_path) -> None:
    """Neither a pickle nor a token nor the name of a folder of this machine was ever sent."""
    sent = hub.everything()
    assert any(name.endswith(".safetensors") for name in sent)
    for name, data in sent.items():
        assert not name.endswith(tuple(PICKLE_SUFFIXES)) and not data.startswith((*PICKLE_STARTS, ZIP_START)), name
        for secret in (TOKEN, OTHER, str(tmp_path.parents[1]), f"{ROOT}/", f"{Path.home()}/"):
            assert secret.encode() not in data, (name, secret)


def spell(arguments: dict) -> list[str]:
    return [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def test_a_refused_token_costs_no_result(hub, rows, tiny_folder, tmp_path, monkeypatch, capsys):
    """It is said before the run and after it, and what is said then is what helps."""
    hub.use(monkeypatch, tmp_path / "home", OTHER)
    write_shards(rows, tmp_path / "scenes")
    arguments = {**PLAIN, "model": tiny_folder(), "data": tmp_path / "scenes", "output_dir": tmp_path / "run",
                 "max_steps": 1, "merge": True, "push_to_hub": "true", "hub_model_id": "me/later"}  # fmt: skip
    logs = []
    monkeypatch.setattr(logging.getLogger("perceptio.train_sft"), "warning", logs.append)
    assert main(spell(arguments)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perceptio: ")]
    result = tmp_path / "run" / "model"
    command = f"hf upload me/later {result}"
    assert len(said) == 1 and f"safe in {result}" in said[0] and "401" in said[0] and f"`{command}`" in said[0]
    assert OTHER not in said[0] and len(logs) == 1 and "nothing can be pushed now" in logs[0]
    assert (result / "model.safetensors").is_file() and ("models", "me/later") not in hub.repositories
    hf, *rest = shlex.split(command)
    environment = hub.environment(tmp_path / "home", TOKEN)
    subprocess.run([Path(sys.executable).with_name(hf), *rest], env=environment, check=True, capture_output=True)
    assert hub.files("me/later") == written(result)
    assert_no_secrets(hub, tmp_path)


def test_an_adapter_of_a_folder_is_not_pushed(hub, rows, tiny_folder, tmp_path, capsys):
    """Nobody could load it, and it would tell where its owner keeps things."""
    write_shards(rows, tmp_path / "scenes")
    arguments = {**PLAIN, "model": tiny_folder(), "data": tmp_path / "scenes", "output_dir": tmp_path / "run",
                 "max_steps": 1, "push_to_hub": "true"}  # fmt: skip
    assert main(spell(arguments)) == 2
    assert "nobody else has that folder" in capsys.readouterr().err and not (tmp_path / "run" / "model").exists()
    trainer = trainer_of(tiny_folder(), rows, tmp_path / "local", max_steps=1)
    trainer.train()
    before = len(hub.requests)
    with pytest.raises(ValueError, match="nobody else has that folder"):
        trainer.push_to_hub()
    assert len(hub.requests) == before and (tmp_path / "local" / "model" / "adapter_model.safetensors").is_file()


def test_a_push_that_breaks_off_is_taken_up(hub, rows, tmp_path, monkeypatch):
    trainer = train(tmp_path / "broken", rows, push_to_hub=False, learning_rate=5e-3)
    folder = tmp_path / "broken" / "model"
    hub.fail_uploads(2, 1, 500)
    with pytest.raises(OSError, match=rf"safe in {folder}.*told to fail.*`hf upload me/broken {folder} --private`"):
        trainer.push_to_hub(private=True)
    before = len(hub.requests)
    future = trainer.push_to_hub(blocking=False)
    assert future.result().commit_url.startswith(hub.endpoint) and hub.files("me/broken") == written(folder)
    assert [request.split()[0] for request in uploads(hub, before)] == ["POST"]  # the weights had been taken
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"safe in .*no connection to http://127.0.0.1:9"):
            trainer.push_to_hub()


def test_what_is_not_the_result_is_not_pushed(hub, rows, tmp_path, monkeypatch):
    trainer = train(tmp_path / "once", rows, push_to_hub=False)
    folder = save_result(trainer)
    before = len(hub.requests)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_world_process_zero", lambda: False)
        assert trainer.push_to_hub() is None
    trainer.state.global_step += 1
    with pytest.raises(ValueError, match="is not the result of step 2"):
        trainer.push_to_hub()
    trainer.state.global_step -= 1
    (folder / "more.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="more.pt"):
        trainer.push_to_hub()
    assert len(hub.requests) == before
    with pytest.raises(ValueError, match="hub_strategy"):
        PerceptioSFTConfig(str(tmp_path / "other"), hub_strategy="every_save")
