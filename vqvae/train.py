"""Train a depth tokenizer, on one CPU or many GPUs.

    python -m perceptio.vqvae.train --config recipes/depth/tiny.yaml --out build/depth-tiny
    accelerate launch -m perceptio.vqvae.train --config recipes/depth/base.yaml --out build/depth

Writes into --out:

    maps/            the depth maps, at the tokenizer's resolution (or in the folder that --maps names)
    checkpoints/     the last two states; the same command, run again, goes on from the newest whole one
    log.jsonl        losses and, now and then, the figures of `perceptio.vqvae.evaluate` on held-out maps
    figures/         depth, codes, decoded depth and error of the same held-out maps as training goes on
    model/           the frozen tokenizer with its evaluation

The batch and every random number of a step follow from the seed and the step alone, so that a run that was killed and
goes on has the same curve as one that was not.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from ..extras import extra

with extra("depth", "training needs"):
    from accelerate import Accelerator

from ..cli import refuse
from ..configuration_perceptio import PerceptioDepthConfig
from ..data.manifest import write_json
from ..modeling_depth_vqvae import DepthVQVAE
from .evaluate import draw, evaluate, report
from .export import export, read_curve, sort_codes
from .maps import MapSet, write_maps
from .quantizer import DepthTraining, LearnedCodebook

LOG, STATE = "log.jsonl", "state.json"
KEPT = 2  # checkpoints
DRAWN = 6  # held-out maps in a figure


@dataclass
class DepthTrainingConfig:
    """All of a run.  Fields of the model are explained in `PerceptioDepthConfig`."""

    out: str = field(metadata={"help": "folder to write"})
    maps: str | None = field(default=None, metadata={"help": "folder for the depth maps, which runs may share"})
    source: str = field(default="world", metadata={"help": "world, or a folder of depth pictures or of shards"})
    train_split: str = field(default="train", metadata={"help": "split of the source to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split of the source to look at on the way"})
    train_count: int | None = field(default=40_000, metadata={"help": "maps to train on"})
    eval_count: int | None = field(default=500, metadata={"help": "held-out maps"})
    image_size: int = 320
    grid_size: int = 10
    num_codes: int = 128
    code_dim: int = 16
    hidden_size: int = 192
    num_encoder_layers: int = 3
    num_decoder_layers: int = 4
    num_attention_heads: int = 6
    depth_offset: float = 0.1
    steps: int = field(default=20_000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=96, metadata={"help": "maps of one step, over all processes"})
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    cool_from: float = field(default=0.4, metadata={"help": "share of the steps after which the learning rate falls"})
    codes_from: float = field(default=0.05, metadata={"help": "share of the steps without codes, before k-means"})
    noise: float = field(default=0.1, metadata={"help": "on the latents before there are codes"})
    loss: str = field(default="l1", metadata={"help": "of log depth: l1 or l2"})
    commitment_weight: float = 0.25
    idle_weight: float = field(default=0.0015, metadata={"help": "of codes being used alike"})
    idle_from: float = field(default=0.45, metadata={"help": "share of the steps without that"})
    idle_until: float = field(default=0.85, metadata={"help": "share of the steps after which it ends"})
    cycle_from: list[float] = field(
        default_factory=lambda: [0.6, 0.75, 0.85, 0.95], metadata={"help": "shares of the steps, rising"}
    )
    cycle_weight: list[float] = field(
        default_factory=lambda: [0.005, 0.05, 0.15, 0.03],
        metadata={"help": "of the decoded map having the same codes, from each of these shares on"},
    )
    joint_from: float = field(
        default=0.95, metadata={"help": "share of the steps after which the cycle trains the decoder too"}
    )
    code_decay: float = field(default=0.99, metadata={"help": "of the moving averages of the codes"})
    revive_below: float = field(default=1.0, metadata={"help": "cells a batch; a code with fewer is placed anew"})
    flip: bool = field(default=True, metadata={"help": "mirror half of the maps"})
    precision: str = field(default="bf16", metadata={"help": "bf16, fp16 or no"})
    seed: int = 0
    log_every: int = 20
    eval_every: int = 1000
    save_every: int = 500

    def __post_init__(self):
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            if kind in (int, int | None) and not isinstance(value, kind):
                raise ValueError(f"`{name}` is {value!r}, expected a whole number")
        checks = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 < self.learning_rate < 1,
            "cool_from": 0 <= self.cool_from <= 1,
            "codes_from": 0 <= self.codes_from < 1,
            "idle_from": 0 <= self.idle_from <= 1,
            "joint_from": 0 <= self.joint_from <= 1,
            "idle_until": 0 <= self.idle_until <= 1,
            "cycle_from": all(0 <= share <= 1 for share in self.cycle_from),
            "cycle_weight": len(self.cycle_weight) == len(self.cycle_from),
            "noise": 0 <= self.noise < math.inf,
            "code_decay": 0 <= self.code_decay < 1,
            "loss": self.loss in ("l1", "l2"),
            "precision": self.precision in ("bf16", "fp16", "no"),
            "log_every": self.log_every >= 1,
            "eval_every": self.eval_every >= 1,
            "save_every": self.save_every >= 1,
        }
        if wrong := next((name for name, good in checks.items() if not good), None):
            raise ValueError(f"`{wrong}` is {getattr(self, wrong)!r}, which it may not be: see --help")
        self.model()

    def model(self) -> PerceptioDepthConfig:
        names = {item.name for item in fields(PerceptioDepthConfig)} & {item.name for item in fields(self)}
        return PerceptioDepthConfig(**{name: getattr(self, name) for name in names})

    def cycle(self) -> list[tuple[float, float]]:
        """(share of the steps from which on, weight)."""
        return list(zip(self.cycle_from, self.cycle_weight, strict=True))

    def recipe(self) -> dict:
        """What decides the result: a run may only be continued with the same."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "maps", *REPORTING)}


REPORTING = ("log_every", "eval_every", "save_every")


def parse(arguments: list[str] | None = None) -> DepthTrainingConfig:
    """The command line, over the values of the YAML file that `--config` names."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(DepthTrainingConfig, prog="python -m perceptio.vqvae.train", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML with any of the fields below; the command line wins")
    if "--config" in arguments[:-1]:
        known = {item.name for item in fields(DepthTrainingConfig)}
        path = arguments[arguments.index("--config") + 1]
        values = _read_yaml(path)
        if strange := sorted(set(values) - known):
            raise ValueError(f"{path} has no field {strange[0]!r}: remove it or correct its spelling")
        for action in parser._actions:
            if action.dest in values:
                action.required = False
        parser.set_defaults(**values)
    options = vars(parser.parse_args(arguments))
    options.pop("config")
    return DepthTrainingConfig(**options)


def _read_yaml(path: str) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected fields with values")
    return values


class Trainer:
    """One run: maps, model, optimizer, and the place in the curve."""

    def __init__(self, config: DepthTrainingConfig):
        self.config, self.out = config, Path(config.out)
        self.accelerator = Accelerator(mixed_precision=config.precision)
        if config.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"`batch_size` is {config.batch_size}, expected a multiple of the {self.accelerator.num_processes} "
                "processes: it counts the maps of all of them"
            )
        self.main = self.accelerator.is_main_process
        self.train_maps, self.eval_maps = self._maps("train"), self._maps("eval")
        torch.manual_seed(config.seed)
        vqvae = DepthVQVAE(config.model())
        codebook = LearnedCodebook(
            config.num_codes,
            config.code_dim,
            decay=config.code_decay,
            revive_below=config.revive_below,
            processes=self.accelerator.num_processes,
        )
        training = DepthTraining(vqvae, codebook, config.loss)
        optimizer = torch.optim.AdamW(training.parameters(), config.learning_rate, (0.9, 0.95))
        optimizer.param_groups[0]["weight_decay"] = config.weight_decay
        self.training, self.optimizer = self.accelerator.prepare(training, optimizer)
        self.step = 0

    def _maps(self, name: str) -> MapSet:
        config = self.config
        folder = (self.out / "maps" if config.maps is None else Path(config.maps)) / name
        with self.accelerator.main_process_first():
            write_maps(
                folder,
                config.source,
                split=getattr(config, f"{name}_split"),
                count=getattr(config, f"{name}_count"),
                side=config.image_size,
                seed=config.seed,
                progress=self.main,
            )
        return MapSet(folder)

    @property
    def parts(self) -> DepthTraining:
        return self.accelerator.unwrap_model(self.training)

    def run(self) -> dict:
        self._resume()
        bar = tqdm(total=self.config.steps, initial=self.step, unit=" steps", disable=None if self.main else True)
        started = time.perf_counter()
        while self.step < self.config.steps:
            losses = self._one_step()
            self.step += 1
            bar.update()
            if self._due(self.config.log_every):
                line = self._log(losses, time.perf_counter() - started)
                bar.set_postfix_str(f"recon {line['recon']:.4f}")
            if self._due(self.config.eval_every):
                self._look()
            if self._due(self.config.save_every):
                self._save()
        bar.close()
        return self._finish()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _one_step(self) -> dict[str, Tensor]:
        config, device = self.config, self.accelerator.device
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        maps, noise = self._batch()
        warm = self.step < round(config.codes_from * config.steps)
        share = self.step / config.steps
        cycle_weight = [0.0, *(weight for start, weight in config.cycle() if share >= start)][-1]
        cycle = None if warm or not cycle_weight else "both" if share >= config.joint_from else "encoder"
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_share(self.step, config)
        losses = self.training(maps.to(device), noise.to(device) if warm else None, cycle)
        loss = losses["recon"] + config.commitment_weight * losses["commitment"]
        if not warm and config.idle_from <= share < config.idle_until:
            loss = loss + config.idle_weight * losses["idle"]
        if cycle is not None:
            loss = loss + cycle_weight * losses["cycle"]
        self._check(loss)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.training.parameters(), 1.0)
        self.optimizer.step()
        return losses

    def _check(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}, expected a finite one: lower `learning_rate` "
                f"({self.config.learning_rate:g}) or set `precision` to no; {self.out / 'checkpoints'} holds the last "
                "good states"
            )

    def _batch(self) -> tuple[Tensor, Tensor]:
        """This process's share of the step's maps, and the noise for it."""
        config, accelerator = self.config, self.accelerator
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        indices = batch_indices(self.step, config.batch_size, len(self.train_maps), config.seed)
        mirrored = (
            torch.rand(config.batch_size, generator=rng) < 0.5 if config.flip else torch.zeros(config.batch_size) > 0
        )
        shape = (config.batch_size, config.code_dim, config.grid_size, config.grid_size)
        noise = config.noise * torch.randn(shape, generator=rng)
        share = config.batch_size // accelerator.num_processes
        own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        maps = self.train_maps[indices[own]]
        return torch.where(mirrored[own, None, None], maps.flip(-1), maps), noise[own]

    def _log(self, losses: dict[str, Tensor], seconds: float) -> dict:
        ids = losses.pop("ids", None)
        mean = {name: self.accelerator.reduce(value.detach().float(), "mean").item() for name, value in losses.items()}
        used = 0 if ids is None else self.accelerator.gather(ids).unique().numel()
        line = {"step": self.step, **mean, "codes_in_batch": used, "seconds": round(seconds, 2)}
        self._write(line)
        return line

    def _write(self, line: dict) -> None:
        if self.main:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def frozen(self) -> DepthVQVAE:
        """A copy of the tokenizer as it is now, its codes sorted by depth."""
        vqvae = DepthVQVAE(self.config.model()).to(self.accelerator.device).eval()
        vqvae.load_state_dict({**self.parts.vqvae.state_dict(), "codebook": self.parts.codebook.codes})
        return sort_codes(vqvae)

    def _look(self) -> None:
        """The figures and a picture of held-out maps.  The other processes wait."""
        if self.main and self.parts.codebook.started:
            vqvae = self.frozen()
            self._write({"step": self.step, "eval": evaluate(vqvae, self.eval_maps)})
            (self.out / "figures").mkdir(exist_ok=True)
            picture = draw(vqvae, self.eval_maps[range(min(DRAWN, len(self.eval_maps)))])
            picture.save(self.out / "figures" / f"step-{self.step:08d}.png")
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """A state of its own folder under its final name only when it is whole."""
        folder = self.out / "checkpoints"
        half = folder / f".step-{self.step:08d}.incomplete"
        if self.main:
            shutil.rmtree(half, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(half))
        self.accelerator.wait_for_everyone()
        if self.main:
            sizes = {path.name: path.stat().st_size for path in sorted(half.iterdir())}
            write_json(half / STATE, {"step": self.step, "recipe": self.config.recipe(), "files": sizes})
            final = folder / f"step-{self.step:08d}"
            shutil.rmtree(final, ignore_errors=True)  # one that was damaged, or the run would not be here again
            os.replace(half, final)
            for old in checkpoints(folder)[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from the newest whole state, if there is one; the log is cut back to it."""
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            for half in (self.out / "checkpoints").glob(".*.incomplete"):
                shutil.rmtree(half)
        self.accelerator.wait_for_everyone()
        found = checkpoints(self.out / "checkpoints")
        if found:
            state = json.loads((found[-1] / STATE).read_text("utf-8"))
            self._check_recipe(state["recipe"])
            self.accelerator.load_state(str(found[-1]))
            self.step = state["step"]
        if self.main:
            _cut_log(self.out / LOG, self.step)
        self.accelerator.wait_for_everyone()

    def _check_recipe(self, found: dict) -> None:
        wanted = self.config.recipe()
        if changed := [name for name in wanted if found.get(name) != wanted[name]]:
            raise ValueError(
                f"{self.out} holds a run with `{changed[0]}` {found.get(changed[0])!r}, expected "
                f"{wanted[changed[0]]!r}: go on with the same recipe, or name another --out"
            )

    def _finish(self) -> dict:
        result: dict = {}
        if self.main:
            vqvae = self.frozen()
            result = report(vqvae, self.eval_maps)
            picture = draw(vqvae, self.eval_maps[range(min(DRAWN, len(self.eval_maps)))])
            known = {key: self.train_maps.facts.get(key) for key in ("source", "teacher", "teacher_licence")}
            facts = {"maps": len(self.train_maps), **known}
            curve = read_curve(self.out / LOG)
            export(vqvae, self.out / "model", result, {**self.config.recipe(), **facts}, picture, curve)
        self.accelerator.wait_for_everyone()
        return result


def learning_rate_share(step: int, config: DepthTrainingConfig) -> float:
    """Up over the warm-up, level, and from `cool_from` on down along a cosine to a fiftieth."""
    rise = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    cooling = max(0.0, step / config.steps - config.cool_from) / max(1 - config.cool_from, 1e-9)
    return rise * max(0.02, 0.5 * (1 + math.cos(math.pi * cooling)))


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """The maps of a step: every epoch goes through all of them in an order of its own, and a step may span two."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = (positions // count).tolist()
    return torch.stack(
        [_order(epoch, count, seed)[place % count] for epoch, place in zip(epochs, positions, strict=True)]
    )


@lru_cache(maxsize=4)
def _order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def checkpoints(folder: Path) -> list[Path]:
    """Whole states, the oldest first."""
    found = []
    for path in sorted(folder.glob("step-*")):
        if (path / STATE).is_file():
            sizes = json.loads((path / STATE).read_text("utf-8"))["files"]
            whole = all(
                (path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items()
            )
            found += [path] if whole else []
    return found


def _cut_log(path: Path, step: int) -> None:
    """Leave out what was logged after the state that the run goes on from, and a line that was torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break
    half = path.with_name(f".{path.name}.incomplete")
    half.write_text("".join(kept), encoding="utf-8")
    os.replace(half, path)


def main(arguments: list[str] | None = None) -> int:
    try:
        trainer = Trainer(parse(arguments))
        result = trainer.run()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return refuse(error)
    if trainer.main:
        print(json.dumps(result, indent=2))
        print(f"wrote {trainer.out / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
