"""What a run leaves behind: a folder that loads, and the scores before and after."""

import copy
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from peft import get_peft_model
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..data.manifest import write_json
from ..hub.manifest import MANIFEST_NAME, scan_pickles
from ..hub.push import check_base_is_public, explain_push
from ..modeling_perceptio import PerceptioForConditionalGeneration
from .adapter_folders import save_adapter_folder, save_merged_folder, save_whole_folder, stamp_adapter
from .models import is_sharded

ARGUMENTS = "training_args.bin"  # a pickle, which nobody should have to load
MODEL, SCORES = "model", "scores.json"


def finish_folder(folder, model, base: str) -> None:
    """What the library's `save_model` wrote, made fit to be loaded by others."""
    folder = Path(folder)
    (folder / ARGUMENTS).unlink(missing_ok=True)
    if (folder / "adapter_model.safetensors").is_file():
        stamp_adapter(folder, model, base)


def save_result(trainer, merge: bool = False, scores: dict | None = None) -> Path:
    """Write `model/` into the output folder, and `scores.json` beside it; prints what changed."""
    folder = Path(trainer.args.output_dir) / MODEL
    model = gather(trainer) if is_sharded(trainer.args) else trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        model.config.untrained = False
        if (folder / MANIFEST_NAME).is_file():  # of the same run, before it went on
            shutil.rmtree(folder)
        if not hasattr(model, "peft_config"):
            save_whole_folder(model, trainer.processing_class, folder, trainer.base_name)
        elif merge:
            save_merged_folder(model, trainer.processing_class, folder, trainer.base_name)
        else:
            save_adapter_folder(model, trainer.processing_class, folder, trainer.base_name)
        if scores and scores["after"]:
            write_json(folder.parent / SCORES, scores)
            print(compare(scores["before"], scores["after"]))
        print(f"wrote {folder}")
    trainer.result_step = trainer.state.global_step
    trainer.accelerator.wait_for_everyone()
    return folder


def push_folder(folder: Path, name: str, token: str | None = None, private: bool | None = None, **kwargs):
    """Upload a result to the model repository `name`, which is made if it is not there, and return the commit.

    kwargs: for `HfApi.upload_folder`.  Whatever goes wrong, the folder stays as it is, and the message says so.
    """
    if problems := scan_pickles(folder):
        raise ValueError(f"{folder} is not pushed: {problems[0]}; take that file out")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        check_base_is_public(json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"])
    api = HfApi(library_name="perceptio", token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=name, folder_path=folder, **kwargs)
    except Exception as error:
        command = shlex.join(["hf", "upload", name, str(folder), *["--private"] * bool(private)])
        raise OSError(
            f"the result is safe in {folder}, but it could not be pushed to {name} ({explain_push(error)}): push it "
            f"with `{command}`"
        ) from error


def gather(trainer):
    """Weights that are cut over the processes, put together in a model in the main process's memory."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    live = trainer.accelerator.unwrap_model(trainer.model)
    inner = live.get_base_model() if hasattr(live, "get_base_model") else live
    with _unsharded(trainer.args):
        model = PerceptioForConditionalGeneration(copy.deepcopy(inner.config))
    model.generation_config = copy.deepcopy(inner.generation_config)
    if hasattr(live, "peft_config"):
        model = get_peft_model(model, next(iter(live.peft_config.values())))
    model.load_state_dict(weights)
    return model


@contextmanager
def _unsharded(args) -> Iterator[None]:
    """DeepSpeed's third stage cuts up every module that is built; not in here."""
    if args.deepspeed_plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def compare(before: dict, after: dict) -> str:
    """A table of each figure before and after."""
    timing = ("_runtime", "_per_second", "_time")
    names = [
        name for name in after if isinstance(after[name], float) and not name.endswith(timing) and name != "epoch"
    ]
    lines = [f"{'':<40}{'before':>10}{'after':>10}"]
    lines += [f"{name:<40}{before.get(name, float('nan')):>10.4f}{after[name]:>10.4f}" for name in names]
    return "\n".join(lines)


def tokenizer_hash(tokenizer) -> str:
    """Of every token and its id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]
