"""A short training, alone or as one of several processes: python train_in_processes.py FOLDER OUT JSON_OF_CHANGES."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from training_samples import absent, masked, plain, records, text_only, trainer_of

from perceptio.training.result import save_result


def mixed() -> list[dict]:
    """In twos, as two processes take them: one has no mask, the other no depth or nothing but text."""
    found = records(7)
    return [plain(found[0]), text_only("a"), found[1], masked(found[2]), absent(found[3]), found[4], text_only("b"),
            plain(found[5])]  # fmt: skip


def take_processes_for_devices() -> None:
    """accelerate shards over GPUs only: on a CPU it goes on without a word, and without sharding."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main() -> None:
    folder, out, changes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    resume, sharded, result = (changes.pop(name, False) for name in ("resume", "sharded", "result"))
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    settings |= {"warmup_steps": 0, "weight_decay": 0.0, "panels": 0}
    before = take_processes_for_devices if sharded else None
    trainer = trainer_of(folder, mixed(), out, before, **{**settings, **changes})
    trainer.train(resume_from_checkpoint=resume or None)
    if sharded:
        assert all(
            isinstance(weight, DTensor) for weight in trainer.model_wrapped.parameters() if weight.requires_grad
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = DTensor.full_tensor if sharded else torch.clone
    trained = {name: whole(weight).detach() for name, weight in model.named_parameters() if weight.requires_grad}
    if trainer.is_world_process_zero():
        lines = [{k: v for k, v in line.items() if isinstance(v, (int, float))} for line in trainer.state.log_history]
        (out / "lines.json").write_text(json.dumps(lines))
        save_file({name: weight.contiguous() for name, weight in trained.items()}, out / "trained.safetensors")
    if result:
        save_result(trainer)


if __name__ == "__main__":
    main()
