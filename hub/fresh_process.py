"""Loads a folder as a stranger does, who has the libraries and not this package.

Run as text by `perceptio.hub.push`, in a process of its own, in which `perceptio` cannot be imported, offline, without
tokens, and with an empty cache.  Its last line of output is a JSON object that says what was seen.  Of a model, the
code that runs is what the folder holds: `push` has put the package's own files there just before.
"""

import importlib.abc
import json
import sys

TRUST = {"trust_remote_code": True}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptio":
            raise ModuleNotFoundError("perceptio is not installed here")


def see_model(folder: str) -> dict:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    model = AutoModelForImageTextToText.from_pretrained(folder, **TRUST)
    if not type(model).__module__.startswith("transformers_modules."):
        raise ValueError(f"the model's class is of {type(model).__module__}, expected the code of the folder")
    processor = type(AutoProcessor.from_pretrained(folder, **TRUST)).__name__
    kind, codes = type(model).__name__, model.config.span_length
    del model
    see = pipeline("perceptio", model=folder, device=0 if torch.cuda.is_available() else -1, **TRUST)
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    answer = see(image=picture, text="What is this?", max_new_tokens=codes + 4)
    if len(answer["depth_codes"]) != codes or tuple(answer["predicted_depth"].shape) != (64, 96):
        raise ValueError(f"the pipeline gave {len(answer['depth_codes'])} depth codes, expected {codes}")
    return {"model": kind, "processor": processor, "pipeline": type(see).__name__, "depth_codes": codes}


def see_dataset(folder: str) -> dict:
    from datasets import get_dataset_split_names, load_dataset

    seen = {}
    for split in get_dataset_split_names(folder):
        row = next(iter(load_dataset(folder, split=split, streaming=True)))
        if not row["messages"]:
            raise ValueError(f"the first row of {split} has no messages")
        seen[split] = f"{len(row)} columns"
    return seen


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    print(json.dumps({"model": see_model, "dataset": see_dataset}[sys.argv[1]](sys.argv[2])))
