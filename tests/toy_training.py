"""A model of a few hundred weights that trains in a fraction of a second, in processes of its own.

The processes are forked from one that has imported everything and done nothing; they are killed like any other.
"""

import json
import os
import resource
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput
from warm import CONTEXT, place

from perceptio.training.checkpoints import EXIT_CODES, SafeCheckpoints
from perceptio.training.guard import GuardedSteps

STEPS = 12
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json")


class ToyModel(nn.Module):
    """Two heads on a body; dropout, so that the random numbers matter."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.3))
        self.text_head, self.mask_head = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x, y, fault=None):
        hidden = self.body(x)
        loss = (self.text_head(hidden)[:, 0] - y).square().mean()
        mask_loss = (self.mask_head(hidden.detach())[:, 0] - y).square()
        if fault is not None:  # a sample with a factor that is not finite spoils the mask head, and nothing else
            mask_loss = mask_loss * fault
        return ModelOutput(loss=loss + mask_loss.mean())


class ToyData(torch.utils.data.Dataset):
    """Samples by number.  `faults` are factors of the mask loss; `pixels` are values of the inputs."""

    def __init__(self, count: int = 64, faults: dict | None = None, pixels: dict | None = None):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 4, generator=generator)
        self.y, self.fault = self.x.sum(1), torch.ones(count)
        for index, value in (faults or {}).items():
            self.fault[index] = value
        for index, value in (pixels or {}).items():
            self.x[index] = value

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index], "fault": self.fault[index], "id": index}


def collate(samples: list[dict]) -> dict:
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "y", "fault")}
    return {**batch, "ids": [f"sample-{sample['id']}" for sample in samples]}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the other processes: sums in another order have other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StockTrainer(Trainer):
    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "ids"})


class ToyTrainer(SafeCheckpoints, GuardedSteps, StockTrainer):
    facts = {"learning_rate": 0.05, "codebook": "c0de"}

    def run_facts(self):
        return self.facts

    def training_step(self, model, inputs, *args, **kwargs):
        self.current_sample_ids += inputs["ids"]
        return super().training_step(model, inputs, *args, **kwargs)


class Slow(TrainerCallback):
    """Time for a signal to arrive."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, *args, **kwargs):
        time.sleep(self.seconds)


def toy(
    output_dir, kind=ToyTrainer, data=None, width=8, slow=0.0, callbacks=(), extra=None, evaluate=False, **options
) -> Trainer:
    """A trainer; `extra` are attributes of its arguments that the stock ones have not."""
    torch.manual_seed(3)
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1,
        "save_steps": 1, "save_strategy": "steps", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "remove_unused_columns": False, "seed": 11, "dataloader_pin_memory": False, "log_level": "error",
        "label_names": ["y"],
    }  # fmt: skip
    args = TrainingArguments(str(output_dir), **{**settings, **options})
    for name, value in (extra or {}).items():
        setattr(args, name, value)
    callbacks = [*callbacks, *([Slow(slow)] if slow else [])]
    data = data or ToyData()
    return kind(ToyModel(width), args, collate, data, data if evaluate else None, callbacks=callbacks)


def curve(trainer_or_folder) -> list[dict]:
    """Losses and gradient norms by step, without what depends on the clock; the last entry is the run's."""
    history = (
        trainer_or_folder.state.log_history
        if isinstance(trainer_or_folder, Trainer)
        else json.loads((Path(trainer_or_folder) / "trainer_state.json").read_text())["log_history"]
    )
    return [entry for entry in history if "loss" in entry]


def train(output_dir, resume=True, file_limit=None, faults=None, pixels=None, **options) -> None:
    """The body of a process: like a command, it ends with a documented exit code and a sentence for an error."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        trainer = toy(output_dir, data=ToyData(faults=faults, pixels=pixels), **options)
        trainer.train(resume_from_checkpoint=resume)
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        (Path(output_dir) / f"weights-{trainer.args.process_index}.json").write_text(json.dumps(weights.tolist()))
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    interrupted = getattr(trainer, "interrupted", None)
    sys.exit(EXIT_CODES[interrupted] if interrupted else 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(log: Path, *args, rank: int = 0, port: int | None = None, **kwargs) -> BaseProcess:
    """A process that calls `train`; with a `port` it is one of two."""
    process = CONTEXT.Process(target=_body, args=(str(log), rank, port, args, kwargs), daemon=True)
    process.start()
    return process


def _body(log: str, rank: int, port: int | None, args: tuple, kwargs: dict) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = sys.stderr = open(stream, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    if port is not None:
        os.environ.update(place(rank, 2, port))
    train(*args, **kwargs)


def start_two(log: Path, *args, **kwargs) -> list[BaseProcess]:
    port = free_port()
    return [
        start(log.with_name(f"{log.name}.{rank}"), *args, rank=rank, port=port, ddp_backend="gloo", **kwargs)
        for rank in (0, 1)
    ]


def wait_for(condition, process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the process ended too early"
        assert time.monotonic() < end, "the process does not get there"
        time.sleep(0.005)


def wait(process, seconds: float = 300) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "the process does not end"
    return process.exitcode
