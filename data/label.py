"""Labelling: a picture → its depth map → its depth codes.  Pure functions of a batch of rows.

Teachers are described in `perceptio.vqvae.teacher`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ..configuration_perceptio import PerceptioDepthConfig
from ..files_perceptio import check_weight_files, weight_files
from ..modeling_depth_vqvae import DepthVQVAE
from ..processing_perceptio import PictureError, load_picture
from ..vqvae.teacher import ask, teacher_from
from .depths import DepthError, decode_depth, encode_depth, normalise
from .validate import check_record

PROBLEM = "problem"  # the column that says, for each row, what is wrong with it ("reason: details"), or None
LONGEST_SIDE = 512  # of a map that is stored: more than the depth tokenizer sees, less than the picture takes
MOST_HOLES = 0.1  # share of a map that may be filled from its surroundings before it is encoded


def label_batch(batch: dict[str, list], teacher: Callable | None, vqvae: DepthVQVAE) -> dict[str, list]:
    """The same rows with depth, its codes and the column `problem`; no row is left out.

    A row that has depth keeps it, one without gets the teacher's.  Without a teacher a row whose answers ask for depth
    must have it.  Small holes are filled for the codes alone: the map that is stored keeps them.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    problems: list[str | None] = [None] * len(rows)
    codebook = vqvae.codebook_hash()
    _add_depth(rows, problems, teacher, codebook)
    for index, row in enumerate(rows):
        if problems[index] is None and row["depth"] is not None:
            try:
                row["depth_codes"] = encode_codes(decode_depth(row["depth"]["bytes"] or b""), vqvae)
                row["depth_codebook"] = codebook
            except (DepthError, ValueError) as error:
                problems[index] = f"unusable depth: {error}"
    names = list(batch)
    return {**{name: [row[name] for row in rows] for name in names}, PROBLEM: problems}


def _add_depth(rows: list[dict], problems: list, teacher: Callable | None, codebook: str) -> None:
    waiting, pictures = [], []
    for index, row in enumerate(rows):
        coded = row["depth_codes"] is not None and row["depth_codebook"] == codebook
        if row["image"] is None or row["depth"] is not None or coded:
            continue
        if teacher is None:
            if any("depth" in (message["perception"] or "") for message in row["messages"]):
                problems[index] = f"no depth: an answer of {row['id']!r} asks for it, and there is no teacher"
            row["depth_codes"] = row["depth_codebook"] = None  # those of another codebook mean nothing here
            continue
        try:
            pictures.append(load_picture(row["image"]["bytes"] or b""))
            waiting.append(index)
        except PictureError as error:
            problems[index] = f"damaged picture: {error}"
    for index, picture, values in zip(waiting, pictures, ask(teacher, pictures), strict=True):
        try:
            if isinstance(values, Exception):
                raise values
            stored = finish_depth(np.asarray(values), picture.size, getattr(teacher, "kind", "inverse"))
            rows[index]["depth"] = {"bytes": encode_depth(stored), "path": None}
        except (ValueError, RuntimeError) as error:
            problems[index] = f"teacher failed: {' '.join(str(error).split())[:200]}"


def finish_depth(values: np.ndarray, size: tuple[int, int], kind: str = "inverse") -> np.ndarray:
    """A teacher's map → float32 in [0, 1] in the shape of a picture of `size` (width, height), or smaller."""
    return normalise(fit_depth(values, size), kind)


def fit_depth(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A teacher's map, in its own unit → the same in the shape of a picture of `size` (width, height), or smaller."""
    if values.ndim != 2 or 0 in values.shape:
        raise DepthError(f"the map has shape {values.shape}, expected [height, width]")
    if not np.isfinite(values).all():
        share = 1 - np.isfinite(values).mean()
        raise DepthError(f"{share:.1%} of the map is NaN or infinite, expected finite depth")
    scale = min(1, LONGEST_SIDE / max(size))
    shape = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    values = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    if values.shape[-2:] != shape:
        values = F.interpolate(values, size=shape, mode="bilinear", align_corners=False, antialias=True)
    return values[0, 0].numpy()


@torch.no_grad()
def encode_codes(depth: np.ndarray, vqvae: DepthVQVAE) -> list[int]:
    """float32[H, W] in [0, 1], NaN for no value → the code ids of the map, row by row."""
    return vqvae.encode(torch.from_numpy(fill_holes(depth))[None])[0].flatten().tolist()


def fill_holes(depth: np.ndarray) -> np.ndarray:
    """The map with its holes (NaN) filled from their surroundings, at most `MOST_HOLES` of it."""
    holes = np.isnan(depth)
    if not holes.any():
        return depth
    if holes.mean() > MOST_HOLES:
        raise DepthError(
            f"{holes.mean():.0%} of the map has no value, expected at most {MOST_HOLES:.0%}: fill the holes, or leave "
            "the depth out"
        )
    return _fill(depth, holes)


def _fill(depth: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Each hole takes the mean of the smallest square of 2, 4, 8 … pixels around it that has a value."""
    height, width = depth.shape
    cells = np.pad(depth, ((0, height % 2), (0, width % 2)), constant_values=np.nan)
    cells = cells.reshape(-1, 2, (width + 1) // 2, 2)
    known = ~np.isnan(cells)
    count = known.sum((1, 3))
    total = np.where(known, cells, 0).sum((1, 3))
    coarse = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    empty = count == 0
    coarse = _fill(coarse, empty) if empty.any() else coarse
    return np.where(holes, coarse.repeat(2, 0).repeat(2, 1)[:height, :width], depth)


def load_vqvae(folder, device: str = "cpu") -> DepthVQVAE:
    """The frozen depth tokenizer of a folder: its own, or that of a whole Perceptio, of which nothing else is read."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, expected the folder of a depth tokenizer or a Perceptio"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_weight_files(folder, expect_float=config.get("model_type") == "perceptio_depth")
    if config.get("model_type") == "perceptio_depth":
        vqvae = DepthVQVAE.from_pretrained(folder)
    elif config.get("model_type") == "perceptio":
        vqvae = _take_out(folder, config["depth_config"])
    else:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}, expected a depth tokenizer "
            "(perceptio_depth) or a perceptio: name another folder"
        )
    return vqvae.to(device).eval().requires_grad_(False)


def _take_out(folder: Path, config: dict) -> DepthVQVAE:
    vqvae = DepthVQVAE(PerceptioDepthConfig(**{key: value for key, value in config.items() if key != "model_type"}))
    weights = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                if (mark := key.rfind("depth_model.")) >= 0:
                    weights[key[mark + len("depth_model.") :]] = file.get_tensor(key).float()
    if absent := sorted(set(vqvae.state_dict()) - set(weights)):
        raise ValueError(
            f"{folder} has no {absent[0]} of a depth tokenizer, expected a whole Perceptio: save it again"
        )
    vqvae.load_state_dict(weights)
    vqvae.check_loaded(folder)
    return vqvae


@dataclass
class Labeller:
    """`label_batch` by names: it crosses processes as such and loads its models where it is first called.

    check: look at each finished row as `data check` does, so that what comes out can be trained on.
    """

    vqvae: str
    teacher: str = "none"
    device: str = "cpu"
    check: bool = True
    _loaded: tuple = field(default=(), repr=False, compare=False)

    def load(self) -> tuple[Callable | None, DepthVQVAE]:
        if not self._loaded:
            self._loaded = teacher_from(self.teacher, self.device), load_vqvae(self.vqvae, self.device)
        return self._loaded

    def describe(self) -> dict:
        """What decides the result, for the record of the job."""
        codebook = self.load()[1].codebook_hash()
        return {"function": "label", "codebook": codebook, "teacher": Path(self.teacher).name, "check": self.check}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        teacher, vqvae = self.load()
        done = label_batch(batch, teacher, vqvae)
        if self.check:
            _check(done, vqvae)
        return done

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": ()}


def _check(batch: dict[str, list], vqvae: DepthVQVAE) -> None:
    expected = {"num_codes": vqvae.config.num_codes, "span_length": vqvae.config.span_length}
    names = [name for name in batch if name != PROBLEM]
    for index, problem in enumerate(batch[PROBLEM]):
        if problem is None:
            record = {name: batch[name][index] for name in names}
            if found := check_record(record, codebook=vqvae.codebook_hash(), **expected):
                batch[PROBLEM][index] = f"invalid {found[0].field.partition('[')[0]}: {found[0]}"
