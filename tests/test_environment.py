"""Odd machines: no home, no network, no cache, no optional package, other locales: it works, or one line says why."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import Blob, Commit, HubServer, Repository
from PIL import Image
from shard_samples import folder_of

import perceptio
from perceptio.cli import main

ROOT = Path(perceptio.__file__).parent
OPTIONAL = (
    "OpenEXR", "accelerate", "bitsandbytes", "datasets", "embreex", "fastapi", "gradio", "openai", "peft", "pyarrow",
    "pycocotools", "ray", "sentencepiece", "torchao", "torchvision", "trl", "uvicorn", "vector_quantize_pytorch",
)  # fmt: skip
FIRST_HALF = "0a1b2c3d"  # part of the name of a file that was not fetched to its end

# Imports the libraries once, and takes each step in a copy of itself, with the output of its own.
CHILD = """
import contextlib, json, locale, os, resource, runpy, sys, tempfile, traceback

class Without:
    absent = set()
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.absent else self.finder.find_spec(name, path, target)

def leave_out(names):
    Without.absent.update(names)
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]

plan = json.loads(sys.argv[1])
with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_ALL, "")  # as programs with windows do
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
leave_out(plan["absent"])
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
if not plan["absent"]:
    from transformers import Trainer

def load(way, folder, out=None):
    if way == "package":
        import perceptio
    else:
        leave_out(["perceptio"])
    trust = {"trust_remote_code": way == "remote"}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(model).__module__.startswith("perceptio." if way == "package" else "transformers_modules.")
    parts = [{"type": "image", "image": Image.new("RGB", (96, 64), "red")}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    print(json.dumps(model.perceive(**inputs, max_new_tokens=16).sequences.tolist()))
    if out is not None:
        model.save_pretrained(out)
        processor.save_pretrained(out)

def take(words):
    if words[0] in ("package", "remote"):
        return load(*words) or 0
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        return runpy.run_module(words[1], run_name="__main__", alter_sys=True) and 0
    if words[0].endswith(".py"):
        return runpy.run_path(words[0], run_name="__main__") and 0
    from perceptio.cli import main
    return main(words)

def copy_takes(words, absent=(), most=None):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        copy = os.fork()
        if not copy:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                leave_out(absent)
                if most is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
                code = take([os.fsdecode(word.encode()) for word in words])
            except SystemExit as stopped:
                code = stopped.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        texts = [file.seek(0) or file.read().decode("utf-8", "replace") for file in (out, err)]
        return {"code": code, "out": texts[0], "err": texts[1]}

os.umask(plan["umask"])
print(json.dumps([copy_takes(**step) for step in plan["steps"]]))
"""


def in_child(steps, cwd, environment: dict, *, absent=(), umask: int = 0o22, before=()) -> list[SimpleNamespace]:
    """What each step printed, and its exit code.  before: a command that runs the rest."""
    steps = [step if isinstance(step, dict) else {"words": step} for step in steps]
    plan = {
        "absent": list(absent),
        "umask": umask,
        "steps": [{**s, "words": list(map(str, s["words"]))} for s in steps],
    }
    command = [*before, sys.executable, "-B", "-c", CHILD, json.dumps(plan)]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [SimpleNamespace(**found) for found in json.loads(run.stdout.splitlines()[-1])]


def surroundings(**changes) -> dict[str, str]:
    """Those of this process without its home, its caches, its languages and its network."""
    odd = ("HF_", "HUGGING_FACE_", "XDG_", "LC_", "LANG", "PYTHON", "TZ")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(odd) and name != "HOME"}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **changes}


def one_line(done, *said: str) -> None:
    lines = [line for line in done.err.splitlines() if line.startswith("perceptio: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.err, done.err[-2000:]
    assert all(text in lines[0] for text in said), lines[0]


def no_fault(*steps) -> None:
    for done in steps:
        assert done.code == 0 and "Traceback" not in done.err, done.err[-3000:]


def content(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def locked(folder: Path) -> Path:
    """The folder, which can only be read from now on."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    return folder


@pytest.fixture(scope="module")
def nobody() -> list[str]:
    """A command that makes its process one of a user without a name or a right, as in many a container."""
    command = ["unshare", "--map-user=54321"]
    usable = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if usable else []


@pytest.fixture(scope="module")
def bound(nobody) -> list[str]:
    """The same where permissions bind nobody otherwise."""
    if os.geteuid() == 0 and not nobody:
        pytest.skip("root may write anywhere, and this machine lets it be nobody else")
    return nobody


@pytest.fixture
def photo(picture, tmp_path) -> Path:
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def see(photo, model, *more) -> list:
    return ["see", photo, "What?", "--model", model, "--max-new-tokens", "16", *more]


# Nowhere to write


def test_a_user_without_a_home_in_a_folder_that_is_read_only(tiny_folder, photo, nobody, tmp_path):
    still = tmp_path / "still"
    still.mkdir(mode=0o500)
    model, environment = tiny_folder(), surroundings(HF_MODULES_CACHE=str(tmp_path / "modules"))
    push = ["push", model, "me/see", "--dry-run", "--no-verify", "--license", "mit"]
    steps = [see(photo, model), ["doctor"], push, ["package", model], ["remote", model]]
    steps += [see(photo, model, "--out", "result.png")]
    *done, last = in_child(steps, still, environment, before=nobody)
    no_fault(*done)
    assert "object score" in done[0].out and "for the model me/see" in done[2].out
    assert done[3].out == done[4].out
    if nobody or os.geteuid() != 0:
        one_line(last, "--out result.png", "cannot be written")
        assert "loading" not in last.err and list(still.iterdir()) == []


def test_without_any_optional_package_and_without_a_cache(tiny_folder, photo, tmp_path):
    model, nowhere = tiny_folder(), photo / "below"
    environment = surroundings(
        HOME=str(nowhere), HF_HOME=str(nowhere / "hf"), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    steps = [see(photo, model), ["doctor"], ["package", model], ["remote", model]]
    done = in_child(steps, tmp_path, environment, absent=OPTIONAL)
    no_fault(*done)
    assert "object score" in done[0].out and "(HF_HUB_OFFLINE)" in done[1].out
    assert done[2].out == done[3].out


# The cache


@pytest.fixture(scope="module")
def hub(tiny_folder):
    """With the model me/see."""
    files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in tiny_folder().iterdir()}
    with HubServer({}) as server:
        repository = server.repositories["models", "me/see"] = Repository("models", "me/see")
        repository.add("main", Commit("me/see", "", None, files))
        server.objects |= {blob.sha256: blob.data for blob in files.values() if blob.lfs}
        yield server


@pytest.fixture(scope="module")
def fetched(hub, tiny_folder, tmp_path_factory):
    """A cache that held halves of the weights, and what each step said that used it; two had no room on the disk."""
    place = tmp_path_factory.mktemp("fetched")
    blobs = place / "home" / "hub" / "models--me--see" / "blobs"
    blobs.mkdir(parents=True)
    ((name, weights),) = hub.objects.items()
    half = len(weights) // 2
    (blobs / f"{name}.incomplete").write_bytes(b"\0" * half)
    (blobs / f"{name}.{FIRST_HALF}.incomplete").write_bytes(weights[:half])
    photo = ROOT / "assets" / "cups.jpg"
    steps = {
        "no room": {"words": see(photo, "me/see"), "most": half},
        "seen": see(photo, "me/see", "--out", "result.png"),
        "remote": ["remote", "me/see"],
        "local": ["package", tiny_folder()],
        "no room for the result": {"words": see(photo, "me/see", "--out", "second.png"), "most": 1000},
    }
    done = in_child(steps.values(), place, hub.environment(place / "home") | {"OMP_NUM_THREADS": "1"})
    return place, dict(zip(steps, done, strict=True))


def test_a_disk_that_is_full(fetched):
    place, done = fetched
    one_line(done["no room"], "me/see", str(place / "home" / "hub"), "set HF_HOME to a folder that can be written and")
    one_line(done["no room for the result"], "--out second.png cannot be written", "make room")
    assert "object score" in done["no room for the result"].out
    assert (place / "result.png").exists() and not (place / "second.png").exists()


def test_half_a_download_ends_as_a_whole_one(fetched, hub):
    place, done = fetched
    no_fault(done["seen"], done["remote"], done["local"])
    assert done["remote"].out == done["local"].out
    (snapshot,) = (place / "home" / "hub" / "models--me--see" / "snapshots").iterdir()
    sent = hub.files("me/see")
    assert {"model.safetensors", "config.json", "modeling_perceptio.py"} <= {path.name for path in snapshot.iterdir()}
    assert all(path.read_bytes() == sent[path.name] for path in snapshot.iterdir())


def test_a_read_only_cache_without_a_network_is_enough(fetched, hub, photo, bound, tmp_path):
    home = locked(shutil.copytree(fetched[0] / "home", tmp_path / "home", symlinks=True))
    environment = surroundings(HF_HOME=str(home), HF_MODULES_CACHE=str(tmp_path / "modules"))
    before, asked = content(home), len(hub.requests)
    steps = [see(photo, "me/see"), ["remote", "me/see"], see(photo, "me/other")]
    seen, remote, other = in_child(steps, tmp_path, environment, before=bound)
    no_fault(seen, remote)
    assert remote.out == fetched[1]["remote"].out
    one_line(other, "couldn't find them in the cached files")
    assert content(home) == before and len(hub.requests) == asked


def test_a_cache_that_cannot_be_made(hub, photo, tmp_path):
    home = photo / "below"
    (done,) = in_child([see(photo, "me/see")], tmp_path, hub.environment(home) | {"OMP_NUM_THREADS": "1"})
    one_line(done, "me/see cannot be kept in the cache", str(home), "set HF_HOME")


def test_a_cache_that_may_not_be_written(hub, photo, bound, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    environment = hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    (done,) = in_child([see(photo, "me/see")], tmp_path, environment, before=bound)
    one_line(done, str(home), "Check cache directory permissions")


# One optional package is absent


def test_what_needs_an_absent_package_names_its_extra(tiny_folder, tmp_path):
    model, scenes, out = tiny_folder(), folder_of(tmp_path / "scenes", 2), tmp_path / "out"
    build = ["world", "build", out, "--scenes", "1"]
    label = ["label", "--images", scenes, "--out", out, "--teacher", "none", "--vqvae", model]
    ray = ["-m", "perceptio.data.job", "--in", scenes, "--out", out, "--vqvae", model, "--engine", "ray"]
    evaluate = ["eval", "world", "--data", scenes, "--out", out]
    serve = ["serve", "--model", model, "--port", "0"]
    tune = [ROOT / "train_sft.py", "--help"]
    modules = (
        "data.job", "data.joint_run", "data.pick", "data.sources.counterfactual",
        "evaluation.choice.hardblink_build", "vqvae.evaluate", "vqvae.export", "vqvae.maps", "vqvae.train",
    )  # fmt: skip
    cases = []
    for package in ("datasets", "pycocotools"):
        cases += [(package, ["data", "check", scenes], "data"), (package, evaluate, "eval")]
        cases += [(package, ["push", model, "me/see", "--dry-run"], "data"), (package, label, "label")]
        cases += [(package, build, "world"), (package, ["world", "sheet", tmp_path / "sheet.png"], "world")]
        cases += [(package, ["-m", f"perceptio.{name}", "--help"], "data") for name in modules]
    cases += [("embreex", build, "world"), ("embreex", ["-m", "perceptio.hub.small", "--help"], "world")]
    cases += [("embreex", ["-m", "perceptio.vqvae.maps", out, "--count", "1"], "world")]
    cases += [("accelerate", ["-m", "perceptio.vqvae.train", "--help"], "depth")]
    cases += [(package, tune, "train") for package in ("accelerate", "datasets", "peft", "trl")]
    cases += [("ray", ray, "label"), ("uvicorn", serve, "serve"), ("fastapi", serve, "serve")]
    steps = [{"words": words, "absent": [package]} for package, words, _ in cases]
    for (package, words, extra), done in zip(cases, in_child(steps, tmp_path, surroundings()), strict=True):
        last = done.err.splitlines()[-1]
        assert done.code != 0 and last.count("pip install") == 1, (package, words, done.err[-1000:])
        assert f'pip install "perceptio[{extra}]"' in last, (package, words, last)
        if words[0] not in ("-m", tune[0]):
            one_line(done, extra)
    assert not (tmp_path / "sheet.png").exists() and not list(out.rglob("*.parquet"))


# Languages, clocks and permissions


def turkish(folder: Path) -> dict[str, str]:
    """There upper case I is not i, and a comma stands before decimals."""
    if shutil.which("localedef"):
        made = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")]
        subprocess.run(made, capture_output=True)  # where its sources are not there the name alone is Turkish
    return {"LOCPATH": str(folder), "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "11"}


def tried(place: Path, model: Path, environment: dict, umask: int) -> SimpleNamespace:
    """The same commands in other surroundings: what they said, and what they wrote."""
    data = place / "data"
    data.mkdir()
    Image.new("RGB", (96, 64), "red").save(data / "a.png")
    shutil.copy(data / "a.png", data / "çay.png")
    rows = [{"image": "a.png", "question": f"Nerede {i}?", "answer": "İşte…"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*rows, {**rows[0], "answer": 3, "question": "Çay…"}]]
    (data / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = [str(ROOT / "train_sft.py"), "--model", "layout:8b", "--data", data, "--output_dir", place / "out"]
    steps = [
        ["package", model, place / "saved"],
        ["world", "build", place / "world", "--scenes", "2", "--workers", "1", "--seed", "3"],
        see(data / "çay.png", model, "--json", "--out", place / "çıktı.png"),
        ["data", "check", data],
        [*recipe, "--dry_run"],
    ]
    found = in_child(steps, place, surroundings(HOME=str(place), **environment), umask=umask)
    no_fault(*found[:3], found[4])
    ids, _, answer, check, dry_run = found
    written = content(place / "world") | content(place / "saved")
    return SimpleNamespace(place=place, ids=json.loads(ids.out), answer=json.loads(answer.out), check=check,
                           estimate=dry_run.out, written=written)  # fmt: skip


@pytest.fixture(scope="module")
def usual(tiny_folder, tmp_path_factory):
    environment = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "TZ": "UTC", "PYTHONHASHSEED": "0"}
    return tried(tmp_path_factory.mktemp("usual"), tiny_folder(), environment, umask=0o22)


@pytest.mark.parametrize("odd", ["ascii", "turkish"])
def test_the_same_is_said_and_written_in_other_surroundings(odd, usual, tiny_folder, tmp_path):
    """Hash seed, language, time zone and permissions change neither an id nor a byte; ASCII has `?` for some signs."""
    environment, umask = turkish(tmp_path), 0o77
    if odd == "ascii":
        environment, umask = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "7"}, 0o02
    (tmp_path / "place").mkdir()
    found = tried(tmp_path / "place", tiny_folder(), environment, umask)
    assert found.ids == usual.ids and found.answer == usual.answer
    assert not found.answer["generated_text"].isascii()
    assert found.written == usual.written and len(found.written) > len(perceptio.files_perceptio.CODE_FILES) + 5
    assert found.check.code == usual.check.code == 1 and "row 4, field `answer`: 3 (int)" in found.check.out
    expected = usual.estimate.encode("ascii", "replace").decode() if odd == "ascii" else usual.estimate
    assert found.estimate == expected and "×" in usual.estimate
    assert (found.place / "çıktı.png").stat().st_size > 1000
    if umask == 0o77:
        modes = [path.stat().st_mode for part in ("world", "saved") for path in (found.place / part).rglob("*")]
        assert modes and not any(stat.S_IMODE(mode) & 0o077 for mode in modes)


# Names from another system


def test_the_separator_of_another_system_is_named(picture, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    picture.save(tmp_path / "sub" / "b.png")
    rows = [
        {"image": name, "question": "What?", "answer": "Red."} for name in ("sub/b.png", "sub\\b.png", "..\\b.png")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main(["data", "check", str(tmp_path)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2 and "row 2, field `image`" in problems[0] and "leads out with '..'" in problems[1]
    assert problems[0].endswith("write / between folders")


def test_a_manifest_with_the_separator_of_another_system_is_refused(tiny_folder, tmp_path, capsys):
    shards = folder_of(tmp_path / "scenes", 2)
    manifest = json.loads((shards / "manifest.json").read_text("utf-8"))
    (entry,) = manifest["splits"]["train"]["shards"]
    entry["file"] = entry["file"].replace("/", "\\")
    (shards / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["data", "check", str(shards)]) == 2
    assert "names 'data\\\\train-" in (said := capsys.readouterr().err) and said.count("perceptio: ") == 1
    model = shutil.copytree(tiny_folder(), tmp_path / "model")
    manifest = json.loads((model / "manifest.json").read_text("utf-8"))
    manifest["files"]["sub\\config.json"] = manifest["files"].pop("config.json")
    (model / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["doctor", "--verify", str(model)]) == 1
    assert "manifest.json: names 'sub\\\\config.json'" in capsys.readouterr().out
