"""`perceptio label`: pictures → depth maps and their codes.

    OUT/depth/<path of the picture>.png   relative inverse depth, 16 bits, 0 = no value
    OUT/metadata.jsonl                    a line for each picture: its depth, what 0 and 1 stood for, its codes
    OUT/problems.jsonl                    pictures that could not be labelled, and why
    OUT/labels.json                       what it was made with; written last, so a folder that has it is finished

Pictures are taken in the order of their paths, in batches that stay the same when the command is run again, so that a
killed run goes on and ends with the bytes of one that was not.  Pictures that had a problem are tried again.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import DEFAULT_DEPTH_MODEL
from ..extras import extra

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
DEPTH_ENDINGS = (".png", ".tif", ".tiff", ".npy", ".exr")
METADATA, PROBLEMS, NOTE = "metadata.jsonl", "problems.jsonl", "labels.json"
BEGUN, LOCK = ".labels.begun.json", ".labels.lock"
EPILOG = """Examples:
  perceptio label --images photos --out labels
  perceptio label --images photos --out seen --vqvae none    # depth alone, to train a depth tokenizer on
  perceptio label --images photos --out labels --vqvae my-tokenizer --teacher none --depth seen/depth
  perceptio label --images photos --out labels --teacher none --depth lidar --depth-kind metres --depth-unit 0.001
  perceptio label --images build/raw --out build/labelled --workers 4     # shards with a manifest.json"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "label",
        help="give pictures depth maps and depth codes",
        description="A folder of pictures, or of shards, gets the depth that a teacher sees in each picture (or depth "
        "that you have), and the codes of a depth tokenizer. Pictures that cannot be used are listed and left out. "
        "Run again after an interruption, it goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", metavar="DIR", required=True, help="pictures, in sub-folders too; or shards")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--vqvae",
        metavar="DIR",
        help="depth tokenizer, or a whole Perceptio; none: depth without codes (default: the one that ships)",
    )
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        default="small",
        help="small, base, large (Depth Anything V2), the folder or Hub id of another depth model, or none "
        "(default: %(default)s)",
    )
    parser.add_argument("--depth", metavar="DIR", help="your depth files, named as the pictures; with --teacher none")
    parser.add_argument(
        "--depth-kind", choices=("inverse", "metres"), default="inverse", help="larger is nearer, or farther"
    )
    parser.add_argument(
        "--depth-unit", type=float, default=1.0, metavar="X", help="of a step, e.g. 0.001 for millimetres"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, for shards (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    parser.set_defaults(run=run)


def run(options) -> int:
    images = Path(options.images)
    if not images.is_dir():
        raise FileNotFoundError(f"`--images` is {images}, expected a folder of pictures or of shards")
    if options.batch_size < 1 or options.workers < 1:
        raise ValueError(
            f"`--batch-size` is {options.batch_size} and `--workers` {options.workers}, expected 1 or more"
        )
    if not 0 < options.depth_unit < float("inf"):
        raise ValueError(f"`--depth-unit` is {options.depth_unit}, expected a number above 0")
    shards = (images / "manifest.json").is_file()
    if shards and options.depth is not None:
        raise ValueError(f"`--depth` is {options.depth}, but shards hold their depth themselves: leave it out")
    if (options.depth is None) != (options.teacher != "none") and not shards:
        raise ValueError(
            "`--depth` and `--teacher none` belong together: give both for depth that you have, or neither"
        )
    vqvae = options.vqvae or str(DEFAULT_DEPTH_MODEL)
    if vqvae == "none" and shards:
        raise ValueError("`--vqvae` is none, but shards are labelled with codes: name a depth tokenizer")
    if vqvae != "none" and not (Path(vqvae) / "config.json").is_file():
        raise FileNotFoundError(f"`--vqvae` is {vqvae}, expected the folder of a depth tokenizer or of a Perceptio")
    from ..cli import choose_device

    device = str(choose_device(options.device))
    _say_licence(options.teacher)
    with extra("label", "labelling needs"):
        return (_label_shards if shards else _label_pictures)(options, vqvae, device)


def _say_licence(teacher: str) -> None:
    from .teacher import licence_of

    if (licence := licence_of(teacher)) not in (None, "Apache-2.0"):
        print(f"note: the weights of {teacher} are {licence}", file=sys.stderr)


def _label_shards(options, vqvae: str, device: str) -> int:
    from ..data.job import run_job
    from ..data.label import Labeller
    from ..data.tally import Tally

    manifest = run_job(
        options.images,
        options.out,
        Labeller(vqvae, options.teacher, device),
        workers=options.workers,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    for split, entry in manifest["splits"].items():
        print(Tally(split).add(entry["tally"]))
    return 0


def _label_pictures(options, vqvae: str, device: str) -> int:
    from ..data.label import load_vqvae
    from .teacher import licence_of, teacher_from

    kind, unit = options.depth_kind, options.depth_unit
    measured = None if options.depth is None else Measured(Path(options.depth), kind, unit)
    facts = {
        "images": Path(options.images).resolve().name,
        "teacher": Path(options.teacher).name if Path(options.teacher).exists() else options.teacher,
        "teacher_licence": licence_of(options.teacher),
        "depth_kind": None if measured is None else kind,
        "depth_unit": None if measured is None else unit,
    }
    model = None if vqvae == "none" else load_vqvae(vqvae, device)
    source = measured or Taught(teacher_from(options.teacher, device))
    note = label_folder(
        options.images, options.out, source, model, facts, batch_size=options.batch_size, progress=True
    )
    print(f"{options.out}: {note['pictures']} pictures labelled, {sum(note['left_out'].values())} left out")
    for reason, count in note["left_out"].items():
        print(f"  {count} × {reason} (see {Path(options.out) / PROBLEMS})")
    return 1 if note["left_out"] else 0


class Taught:
    """Depth from a teacher: (pictures, their names) → for each (map, scale), or the error instead."""

    def __init__(self, teacher: Callable):
        self.teacher, self.kind = teacher, getattr(teacher, "kind", "inverse")

    def __call__(self, pictures: list, names: list[str]) -> list:
        from .teacher import ask

        found = zip(ask(self.teacher, pictures), pictures, strict=True)
        return [_or_error(self._fit, values, picture) for values, picture in found]

    def _fit(self, values, picture):
        import numpy as np

        from ..data.depths import normalise_with_scale
        from ..data.label import fit_depth

        if isinstance(values, Exception):
            raise values
        return normalise_with_scale(fit_depth(np.asarray(values), picture.size), self.kind)


class Measured:
    """Depth from files under the names of the pictures: a person's own, or those that an earlier run wrote, which are
    taken over with their scale."""

    def __init__(self, folder: Path, kind: str, unit: float):
        if not folder.is_dir():
            raise FileNotFoundError(f"`--depth` is {folder}, expected a folder of depth files")
        self.folder, self.kind, self.unit = folder, kind, unit
        written = folder.parent / NOTE
        self.scales = {row["image"]: row for row in _read_lines(folder.parent / METADATA)} if written.is_file() else {}

    def __call__(self, pictures: list, names: list[str]) -> list:
        return [_or_error(self._read, picture, name) for picture, name in zip(pictures, names, strict=True)]

    def _read(self, picture, name: str):
        from ..data.depths import Scale, decode_depth, normalise_with_scale, read_values

        path = self._find(name)
        if row := self.scales.get(name):
            scale = Scale(row["depth_low"], row["depth_high"], row["depth_scale_kind"])
            found = decode_depth(path.read_bytes()), scale
        else:
            found = normalise_with_scale(read_values(path, path.name, self.kind, self.unit), self.kind)
        _check_shape(found[0].shape, picture.size, path.name)
        return found

    def _find(self, name: str) -> Path:
        from ..data.depths import DepthError

        bare = self.folder / name
        for end in DEPTH_ENDINGS:
            for path in (bare.with_suffix(end), bare.with_name(bare.name + end)):
                if path.is_file():
                    return path
        raise DepthError(f"no depth: {self.folder} has no {Path(name).stem} with one of {', '.join(DEPTH_ENDINGS)}")


def _check_shape(shape: tuple[int, int], size: tuple[int, int], name: str) -> None:
    """The depth map has the picture's shape, to a pixel of the smaller of the two."""
    from ..data.depths import DepthError

    (height, width), (across, down) = shape, size
    if abs(width * down - height * across) > max(width + height, across + down):
        raise DepthError(
            f"{name} is {width} × {height}, its picture {across} × {down}: expected the same shape, whatever the size"
        )


def _or_error(function: Callable, *arguments):
    try:
        return function(*arguments)
    except (ValueError, RuntimeError) as error:
        return error
    except OSError as error:  # a file that cannot be read; one that cannot be written ends the run
        return ValueError(str(error))


def label_folder(
    images, out, source: Callable, vqvae, facts: dict, *, batch_size: int = 8, progress: bool = False
) -> dict:
    """Label every picture below `images`; returns the content of labels.json.

    source: (pictures, their names) → for each (float32[H, W] in [0, 1], its `Scale`), or an exception.
    vqvae: None for depth alone.
    facts: what decides the result besides the tokenizer; a folder that was begun with others is refused.
    """
    from tqdm import tqdm

    from ..data.lock import only_one
    from ..data.manifest import write_json

    images, out = Path(images), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out / LOCK, f"another run is labelling into {out}: wait for it, or name another folder"):
        wanted = {**facts, "codebook": vqvae and vqvae.codebook_hash(), "batch_size": batch_size}
        _check_begun(out, wanted)
        names = list(find_pictures(images, out))
        if not names:
            raise FileNotFoundError(f"{images} holds no picture ({', '.join(sorted(ENDINGS))}): name another folder")
        waiting = _go_on(out, names, batch_size)
        if waiting:
            (out / NOTE).unlink(missing_ok=True)
        done = len(names) - sum(map(len, waiting))
        bar = tqdm(total=len(names), initial=done, unit=" pictures", disable=None if progress else True)
        for batch in waiting:
            lines, problems = _label_batch(images, out, batch, source, vqvae)
            _append(out / METADATA, lines)
            _append(out / PROBLEMS, problems)
            bar.update(len(batch))
        bar.close()
        labelled, failed = _settle(out, names)
        left_out = Counter(line["problem"].partition(":")[0] for line in failed)
        note = {**wanted, "pictures": len(labelled), "left_out": dict(sorted(left_out.items()))}
        write_json(out / NOTE, note)
        (out / BEGUN).unlink(missing_ok=True)
        return note


def _check_begun(out: Path, wanted: dict) -> None:
    from ..data.manifest import write_json
    from ..data.record import DataError

    for name in (NOTE, BEGUN):
        if (out / name).is_file():
            found = json.loads((out / name).read_text("utf-8"))
            if changed := [key for key in wanted if found.get(key) != wanted[key]]:
                raise DataError(
                    f"{out} was labelled with another `{changed[0]}` ({found.get(changed[0])!r}), expected "
                    f"{wanted[changed[0]]!r}: name another folder, or remove this one"
                )
    begun = any((out / name).is_file() for name in (NOTE, BEGUN))
    if not begun and (own := [name for name in (METADATA, PROBLEMS, "depth") if (out / name).exists()]):
        raise DataError(
            f"{out} has a {own[0]} that this command did not write, expected a folder without: name another `--out`"
        )
    write_json(out / BEGUN, wanted)


def find_pictures(images: Path, out: Path) -> Iterator[str]:
    """Paths of the pictures below a folder, sorted, without the depth maps that were written into it."""
    images, depth = images.resolve(), out.resolve() / "depth"
    for path in sorted(images.rglob("*")):
        own = depth in path.parents
        hidden = any(part.startswith(".") for part in path.relative_to(images).parts)
        if path.suffix.lower() in ENDINGS and path.is_file() and not own and not hidden:
            yield path.relative_to(images).as_posix()


def _go_on(out: Path, names: list[str], batch_size: int) -> list[list[str]]:
    """The batches that are left to do; what was written of a batch that was not finished is taken back.

    Of a finished one the pictures that had a problem are left to do: what was wrong may have been put right.
    """
    labelled = {line["image"] for line in _read_lines(out / METADATA) if (out / line["depth"]).is_file()}
    failed = {line["image"] for line in _read_lines(out / PROBLEMS)} - labelled
    waiting, kept = [], []
    for start in range(0, len(names), batch_size):
        batch = names[start : start + batch_size]
        finished = labelled.union(failed).issuperset(batch)
        kept += batch if finished else []
        waiting.append([name for name in batch if name in failed] if finished else batch)
    _settle(out, kept)
    return [batch for batch in waiting if batch]


def _settle(out: Path, names: list[str]) -> tuple[list[dict], list[dict]]:
    """Leave one line for each of these pictures, in their order; returns those with depth and those with a problem."""
    labelled, failed = ({line["image"]: line for line in _read_lines(out / name)} for name in (METADATA, PROBLEMS))
    good = [labelled[name] for name in names if name in labelled]
    bad = [failed[name] for name in names if name in failed and name not in labelled]
    for path, lines in ((out / METADATA, good), (out / PROBLEMS, bad)):
        half = path.with_name(f".{path.name}.incomplete")
        half.unlink(missing_ok=True)
        _append(half, lines)
        os.replace(half, path)
    return good, bad


def _read_lines(path: Path) -> list[dict]:
    """The whole lines of a file; the last may be torn."""
    found: list[dict] = []
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").split("\n")[:-1]:  # a name may hold other line ends
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def _append(path: Path, lines: list[dict]) -> None:
    # A name that is no UTF-8 becomes an escape of JSON, and is itself again when it is read.
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _label_batch(images: Path, out: Path, names: list[str], source, vqvae) -> tuple[list[dict], list[dict]]:
    from ..processing_perceptio import PictureError, load_picture

    problems, pictures = {}, {}
    for name in names:
        try:
            pictures[name] = load_picture(str(images / name))
        except (PictureError, OSError) as error:
            problems[name] = f"damaged picture: {' '.join(str(error).split())}"
    lines = {}
    for name, found in zip(pictures, source(list(pictures.values()), list(pictures)), strict=True):
        try:
            if isinstance(found, Exception):
                raise found
            lines[name] = _finish(out, name, *found, vqvae)
        except (ValueError, RuntimeError) as error:  # not OSError: a full disk ends the run
            problems[name] = f"unusable depth: {' '.join(str(error).split())[:300]}"
    return (
        [{"image": name, **lines[name]} for name in names if name in lines],
        [{"image": name, "problem": problems[name]} for name in names if name in problems],
    )


def _finish(out: Path, name: str, depth, scale, vqvae) -> dict:
    """Write the map of one picture; its line, without the picture's name."""
    from ..data.depths import decode_depth, encode_depth
    from ..data.label import encode_codes

    data = encode_depth(depth)
    codes = {}
    if vqvae is not None:  # codes of what is stored, so that they can be made again from it
        codes = {"depth_codes": encode_codes(decode_depth(data), vqvae), "depth_codebook": vqvae.codebook_hash()}
    path = out / "depth" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.incomplete")
    half.write_bytes(data)
    os.replace(half, path)
    return {
        "depth": path.relative_to(out).as_posix(),
        "depth_low": scale.low,
        "depth_high": scale.high,
        "depth_scale_kind": scale.kind,  # `depth_kind` is what a data set calls the kind of the file: always inverse
        **codes,
    }
