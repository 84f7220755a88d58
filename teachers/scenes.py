"""What the trainings of the parts share: scenes on the disk, drawn from by seed and place, and a run that goes on."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ..processing_perceptio import IMAGENET_MEAN, IMAGENET_STD
from ..training.checkpoints import SafeCheckpoints, checkpoints
from ..training.guard import GuardedSteps
from ..training.muon import MuonTraining
from ..world.instances import InstanceSet, write_instances


@dataclass
class SceneArguments(TrainingArguments):
    """transformers' `TrainingArguments` and the scenes."""

    scenes: int = field(default=12_000, metadata={"help": "to train on"})
    eval_scenes: int = field(default=300, metadata={"help": "held out"})
    muon: bool = field(default=True, metadata={"help": "Muon for the matrices of hidden layers, not AdamW"})
    remove_unused_columns: bool = False

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class SceneDraws(torch.utils.data.Dataset):
    """What `draw` makes of scenes, from the seed and the place alone.  repeats: how often each scene comes."""

    def __init__(self, scenes: InstanceSet, args: SceneArguments, repeats: int = 1):
        self.scenes, self.args, self.repeats = scenes, args, repeats
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.scenes) * self.repeats

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        epoch, index = divmod(place, len(self.scenes))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.args.seed, epoch]).permutation(len(self.scenes)))
        return self.draw(self.scenes[int(self._order[1][index])], np.random.default_rng([place, 7]))

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        raise NotImplementedError


class SceneTrainer(MuonTraining, SafeCheckpoints, GuardedSteps, Trainer):
    facts: tuple[str, ...] = ()  # arguments that a run must keep to go on

    def run_facts(self) -> dict:
        names = ("scenes", "learning_rate", "seed", "max_steps", "per_device_train_batch_size", "muon", *self.facts)
        return {name: str(getattr(self.args, name)) for name in names}

    def train_or_go_on(self):
        return self.train(resume_from_checkpoint=bool(checkpoints(Path(self.args.output_dir))) or None)


def scene_sets(args: SceneArguments, side: int) -> tuple[InstanceSet, InstanceSet, int]:
    """The scenes to train on, those held out, and how often the first must come for all steps."""
    folder = Path(args.output_dir) / "scenes"
    scenes = write_instances(folder / "train", count=args.scenes, side=side, seed=args.seed)
    held_out = write_instances(
        folder / "validation", split="validation", count=args.eval_scenes, side=side, seed=args.seed
    )
    needed = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return scenes, held_out, max(1, -(-needed // len(scenes)))


def as_pixels(image: Tensor) -> Tensor:
    """uint8[S, S, 3] → float[3, S, S] as the vision towers take it."""
    pixels = (image.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return pixels.permute(2, 0, 1).contiguous()
