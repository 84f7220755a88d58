"""What the trainings of the parts share: scenes on the disk, drawn from by seed and place, and a run that goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import TrlParser

from ..cli import refuse
from ..data.manifest import write_json
from ..processing_perceptio import IMAGENET_MEAN, IMAGENET_STD
from ..training.checkpoints import EXIT_CODES, SafeCheckpoints, checkpoints
from ..training.guard import GuardedSteps, NoMemory, check_trackers
from ..training.muon import MuonTraining
from ..world.instances import InstanceSet, write_instances

CUT, LEAST_CUT = 0.7, 0.35  # share of the pictures that show what is around a thing, and the least side of that part


@dataclass
class SceneArguments(TrainingArguments):
    """transformers' `TrainingArguments` and the scenes; a subclass adds `side`, of their pictures."""

    scenes: int = field(default=12_000, metadata={"help": "to train on"})
    eval_scenes: int = field(default=300, metadata={"help": "held out"})
    scenes_folder: str | None = field(
        default=None, metadata={"help": "where they are, or are written to; by default scenes/ in the output folder"}
    )
    start: str | None = field(default=None, metadata={"help": "folder of such a model, trained before, to go on from"})
    muon: bool = field(default=True, metadata={"help": "Muon for the matrices of hidden layers, not AdamW"})
    compiled: bool = field(
        default=False, metadata={"help": "torch.compile while training; a CPU needs a C++ compiler"}
    )
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
    """facts: arguments that a run must keep to go on.  draws: what it trains on.  measured: what it is measured on,
    where that is another.  part: of the model, what is kept.  finish: what is done to the model after its last step.
    measure: figures from the model's outputs on batches of held-out scenes."""

    facts: tuple[str, ...] = ()
    draws: type[SceneDraws]
    measured: type[SceneDraws] | None = None
    part: str
    measure: Callable[[list[dict]], dict]

    @staticmethod
    def finish(model: nn.Module) -> None:
        pass

    def run_facts(self) -> dict:
        names = ("scenes", "learning_rate", "seed", "max_steps", "per_device_train_batch_size", "muon", *self.facts)
        return {name: str(getattr(self.args, name)) for name in names}


def main_of(kind: type[SceneArguments], train: Callable[[SceneArguments], int], arguments: list[str] | None) -> int:
    """The exit code of `train` with the arguments of a command line."""
    try:
        (args,) = TrlParser((kind,)).parse_args_and_config(arguments)
        check_trackers(args.report_to)
        return train(args)
    except (ValueError, OSError, ImportError, FloatingPointError, NoMemory) as error:
        return refuse(error)


def train_part(trainer_class: type[SceneTrainer], model: nn.Module, args: SceneArguments, side: int) -> int:
    """Train `model` on scenes of `side` pixels, and write its part to `model/` with its figures on those held out; the
    exit code."""
    out = Path(args.output_dir)
    scenes, held_out, repeats = _scene_sets(args, side)
    drawn = trainer_class.draws(scenes, args, repeats)
    unseen = (trainer_class.measured or trainer_class.draws)(held_out, args)
    trainer = trainer_class(model, args, train_dataset=drawn, eval_dataset=unseen)
    if args.compiled:
        model.compile()
    trainer.train(resume_from_checkpoint=bool(checkpoints(out)) or None)
    if trainer.interrupted is not None:
        return EXIT_CODES[trainer.interrupted]
    if trainer.is_world_process_zero():
        trainer.finish(model)
        getattr(model, trainer.part).save_pretrained(out / "model")
        figures = {"scenes": len(unseen), **trainer.measure(outputs_on(unseen, model, args.device))}
        write_json(out / "model" / "evaluation.json", figures)
        print(figures)
    return 0


@torch.no_grad()
def outputs_on(draws: SceneDraws, model: nn.Module, device, batch_size: int = 16) -> list[dict]:
    """What the model returns for each batch."""
    model.eval()
    loader = torch.utils.data.DataLoader(draws, batch_size)
    with torch.compiler.set_stance("force_eager"):  # compiling anew would take longer than these few batches
        return [model(**{name: tensor.to(device) for name, tensor in batch.items()}) for batch in loader]


def _scene_sets(args: SceneArguments, side: int) -> tuple[InstanceSet, InstanceSet, int]:
    """The scenes to train on, those held out, and how often the first must come for all steps."""
    folder = Path(args.scenes_folder or Path(args.output_dir) / "scenes")
    scenes = write_instances(folder / "train", count=args.scenes, side=side, seed=args.seed)
    held_out = write_instances(
        folder / "validation", split="validation", count=args.eval_scenes, side=side, seed=args.seed
    )
    needed = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return scenes, held_out, max(1, -(-needed // len(scenes)))


def cut_scene(scene: dict[str, Tensor], side: int, rng, all_of_it: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A square part of the scene with a thing in it, or all of it, in `side` pixels.

    image uint8[side, side, 3], things uint8[side, side], depth float32[side, side] between the part's own nearest and
    farthest, places int[5, 2], -1 outside.
    """
    whole = scene["image"].shape[0]
    shown, size, left, top = scene["things"].nonzero(), whole, 0, 0
    if not all_of_it and len(shown) and rng.random() < CUT:
        size = round(whole * rng.uniform(LEAST_CUT, 1))
        middle = shown[int(rng.integers(len(shown)))].tolist()
        top, left = (min(max(at - int(rng.integers(size)), 0), whole - size) for at in middle)
    rows, columns = slice(top, top + size), slice(left, left + size)
    image, things, depth = resized(scene, rows, columns, side)
    low, high = depth.aminmax()
    places = (scene["places"].int() - torch.tensor([left, top])) * side // size
    places[(scene["places"][:, 0] < 0) | (places < 0).any(1) | (places >= side).any(1)] = -1
    return image, things, (depth - low) / (high - low).clamp(min=1e-6), places


def resized(scene: dict[str, Tensor], rows: slice, columns: slice, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a square part of a scene: image uint8[side, side, 3], things uint8[side, side], depth float32[side, side]."""
    image = scene["image"][rows, columns].permute(2, 0, 1)[None]
    image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).contiguous()
    maps = torch.stack([scene["things"][rows, columns].float(), scene["depth"][rows, columns].float()])
    things, depth = F.interpolate(maps[None], (side, side), mode="nearest-exact")[0]
    return image, things.byte(), depth


def as_pixels(image: Tensor) -> Tensor:
    """uint8[S, S, 3] → float[3, S, S] as the vision towers take it."""
    pixels = (image.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return pixels.permute(2, 0, 1).contiguous()
