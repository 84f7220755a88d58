"""HardBLINK built anew, with other points: photos and their depth → a folder in the published layout.

    python -m perceptio.evaluation.choice.hardblink_build photos hardblink-1 --depths maps --seed 1
    python -m perceptio.evaluation.choice.hardblink_build photos hardblink-1 --teacher small

The rule is the one that the published pictures and their authors' code for training show: photos of 336 × 336; 3, 4
and 5 points around the middle height, at least 20 pixels and 20 of 255 steps of relative inverse depth apart; letters
shuffled; the nearest point is the answer.  As there, a teacher's map decides, so the answers are as good as it is.

The photos must bear no marks: in those of BLINK's relative depth on the Hub two points are circled and lettered, A and
B, so that they do not serve.  A map has the name of its photo with another ending.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...data.depths import normalise, read_depth
from ...data.record import DataError, Problem
from ...data.tally import Tally
from ...processing_perceptio import load_picture
from ...world.marks import APART, BAND, EDGE, GAP, LABEL_ABOVE, LETTER, QUESTION, SIDE, draw_points
from .common import LETTERS
from .hardblink import LEVELS, files_of

TRIES, CANDIDATES = 50, 400
PHOTOS, MAPS = (".jpg", ".jpeg", ".png", ".webp"), (".png", ".tif", ".tiff", ".npy", ".exr")
ANYWHERE = ((LABEL_ABOVE + LETTER) / SIDE, 1 - EDGE)  # of the height, in photos whose middle is too flat


def choose(rng, depth: np.ndarray, count: int, band: tuple[float, float]) -> list[tuple[int, int]] | None:
    """`count` places (x, y) in a picture of SIDE × SIDE, the nearest first; None where the depth has none.

    depth: float[H, W], relative inverse depth, NaN for no value.
    """
    low, high = (int(edge * SIDE) for edge in band)
    for _ in range(TRIES):
        chosen: list[tuple[float, int, int]] = []
        xs = rng.integers(int(EDGE * SIDE), int((1 - EDGE) * SIDE), CANDIDATES)
        for x, y in zip(xs.tolist(), rng.integers(low, high, CANDIDATES).tolist(), strict=True):
            value = depth[int((y + 0.5) / SIDE * depth.shape[0]), int((x + 0.5) / SIDE * depth.shape[1])]
            if value > 0 and all(  # not NaN, and not the very farthest
                abs(value - v) >= GAP and np.hypot(x - px, y - py) >= APART * SIDE for v, px, py in chosen
            ):
                chosen.append((float(value), x, y))
            if len(chosen) == count:
                return [(x, y) for _, x, y in sorted(chosen, reverse=True)]
    return None


def build(photos: Path, out: Path, depth_of: Callable[[Path], np.ndarray], seed: int = 0) -> Tally:
    """Write the folder.  depth_of: photo → float[H, W] as above.  A photo without such points is left out of a level,
    and counted."""
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in PHOTOS)
    if not paths:
        raise DataError(Problem(str(photos), None, "files", "no photo", "JPEG or PNG files", "name their folder"))
    if out.exists() and any(out.iterdir()):
        raise DataError(Problem(str(out), None, "folder", "not empty", "a new folder", "name another"))
    tally, rng = Tally("hardblink"), np.random.default_rng(seed)
    lines: dict[Path, list[dict]] = {path: [] for level in LEVELS for path in files_of(out, level)[:2]}
    for number, path in enumerate(tqdm(paths, unit=" photos", disable=None)):
        photo, depth = np.asarray(load_picture(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR)), depth_of(path)
        for level in LEVELS:
            points = choose(rng, depth, level, BAND) or choose(rng, depth, level, ANYWHERE)
            if points is None:
                tally.drop(f"no {level} points", path.name)
                continue
            letters = "".join(rng.permutation(list(LETTERS[:level])))
            questions, answers, folder = files_of(out, level)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_points(photo, points, letters)).save(folder / f"{number}.png")
            row = {"question_id": number, "image": f"{number}.png", "text": QUESTION, "category": "depth"}
            lines[questions].append(row | {"source": path.name})
            lines[answers].append({"question_id": number, "text": f"({letters[0]})", "category": "depth"})
            tally.keep()
    for path, rows in lines.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tally


def maps_in(folder: Path) -> Callable[[Path], np.ndarray]:
    """The map of a photo, of the same name in a folder."""

    def depth_of(photo: Path) -> np.ndarray:
        for ending in MAPS:
            if (path := folder / f"{photo.stem}{ending}").is_file():
                return read_depth(path, str(path))
        remedy = "label it, or leave the photo out"
        raise DataError(Problem(str(folder), None, photo.stem, "no map", f"{photo.stem}.png or its like", remedy))

    return depth_of


def maps_of(teacher) -> Callable[[Path], np.ndarray]:
    """The map that a `DepthTeacher` sees in a photo."""
    return lambda photo: normalise(np.asarray(teacher([load_picture(photo)])[0], np.float64), teacher.kind)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos without marks")
    parser.add_argument("out", type=Path, help="folder to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--depths", type=Path, metavar="DIR", help="folder of maps, larger is nearer")
    source.add_argument("--teacher", metavar="NAME", help="small, base, large, or a folder or id of such a model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.teacher is None:
        depth_of = maps_in(options.depths)
    else:
        from ...vqvae.teacher import DepthTeacher

        depth_of = maps_of(DepthTeacher(options.teacher))
    print(build(options.photos, options.out, depth_of, options.seed), file=sys.stderr)


if __name__ == "__main__":
    main()
