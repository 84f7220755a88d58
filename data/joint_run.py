"""Write the joint set of one source as shards, with a manifest that says how it was made.

    python -m perceptio.data.joint_run --reader refer --root data --dataset refcoco --split train --out build/joint \
        --captioner CHAT_MODEL --cache build/captions.jsonl --vqvae DEPTH_TOKENIZER --teacher DEPTH_MODEL
"""

import argparse
import importlib
import inspect
import platform
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from ..cli import refuse
from .captions import CachedCaptioner, TemplateCaptioner, TransformersCaptioner
from .joint import DEPTH_TURNS, EXPRESSIONS, MORE, Labeller, build_joint, labeller_from
from .label import load_vqvae, teacher_from
from .manifest import sha256
from .shards import write_shards
from .sources import ITEMS
from .tally import Tally

PACKAGES = ("datasets", "numpy", "pillow", "pyarrow", "pycocotools", "torch", "transformers")


class RunTally(Tally):
    """A tally that says, besides, what it counts and how the run was made."""

    def __init__(self, name: str, run: dict):
        super().__init__(name)
        self.run = run

    def to_dict(self) -> dict:
        return {**super().to_dict(), "unit": "expressions", "run": self.run}


def write_joint(
    reader: str,
    root: str | Path,
    out_dir: str | Path,
    captioner,
    labeller: Labeller | None = None,
    *,
    split: str = "train",
    options: dict | None = None,
    teacher: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **joint,
) -> dict:
    """Read a source, write its joint records as shards, and return the manifest.

    reader: a name of `data.sources.ITEMS`; options: further arguments of it; joint: those of `build_joint`.
    teacher: the name of what the labeller asks, for the manifest.
    """
    if reader not in ITEMS:
        raise ValueError(f"`reader` is {reader!r}, expected one of {', '.join(ITEMS)}")
    name, _, function = ITEMS[reader].partition(":")
    module = importlib.import_module(name, f"{__package__}.sources")
    make_items, options = getattr(module, function), options or {}
    known = set(inspect.signature(make_items).parameters) - {"root", "tally", "split"}
    if strange := sorted(set(options) - known):
        raise ValueError(f"{reader} has no option {strange[0]!r}, expected one of {', '.join(sorted(known))}")
    run = {
        "reader": reader,
        "options": {key: str(value) for key, value in sorted(options.items()) if key != "images_dir"},
        "files": {path.name: sha256(path) for path in module.annotation_files(root, split=split, **options)},
        "captioner": captioner.describe(),
        "teacher": teacher,
        "joint": {"expressions": EXPRESSIONS, "more": MORE[0], "seed": 0, **joint},
        "versions": _versions(),
    }
    tally = RunTally(split, run)
    items = make_items(root, tally=tally, split=split, **options)
    records = build_joint(items, captioner, labeller, tally=tally, **joint)
    records = tqdm(records, unit="record", desc=split, disable=not progress)
    return write_shards(records, out_dir, split=split, tally=tally, overwrite=overwrite)


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"perceptio": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perceptio.data.joint_run",
        description="Write the joint set: for each picture of a source of referring expressions the masks of things, "
        "the depth of the scene, and a sentence about each thing. What cannot be used is counted by reason.",
    )
    parser.add_argument("--reader", default="refer", help="refer, grefcoco or refcoco-parquet (default: %(default)s)")
    parser.add_argument("--root", metavar="DIR", required=True, help="folder of the published files")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of shards to write")
    parser.add_argument("--dataset", help="refcoco, refcoco+ or refcocog")
    parser.add_argument("--split-by", help="unc, umd or google")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--licence", help="of the records, as their source states it (default: unknown)")
    parser.add_argument("--only", help="of gRefCOCO: targets or no-target")
    parser.add_argument("--images-dir", metavar="DIR", help="folder of the pictures, where it is not the usual one")
    parser.add_argument(
        "--captioner",
        metavar="NAME",
        default="template",
        help="template (no model), or the folder or Hub id of a chat model",
    )
    parser.add_argument(
        "--cache", metavar="FILE", help="where captions are kept as they come, so that none is asked twice"
    )
    parser.add_argument("--vqvae", metavar="DIR", help="depth tokenizer, or a whole Perceptio; without it no depth")
    parser.add_argument("--teacher", metavar="NAME", help="folder or Hub id of a depth-estimation model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    parser.add_argument(
        "--expressions", type=int, default=EXPRESSIONS, help="turns of a record (default: %(default)s)"
    )
    parser.add_argument("--more", choices=MORE, default=MORE[0], help="what becomes of further ones")
    parser.add_argument(
        "--depth-turns",
        choices=DEPTH_TURNS,
        help="which answers open with depth; default: the first, and none without --vqvae. Given without --vqvae, the "
        "records are to be labelled afterwards: python -m perceptio.data.job",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="of the captioner (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        manifest = _write(options)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    entry = manifest["splits"][options.split]
    print(f"{entry['rows']} records; {entry['tally']['kept']} of {entry['tally']['read']} expressions kept")
    for reason, count in entry["tally"]["dropped"].items():
        print(f"  {count} {reason}")
    return 0


def _write(options: argparse.Namespace) -> dict:
    if (options.vqvae is None) != (options.teacher is None):
        raise ValueError("depth needs --vqvae and --teacher, expected both or neither: pass the other one too")
    captioner = TemplateCaptioner(options.seed)
    if options.captioner != "template":
        captioner = TransformersCaptioner(options.captioner, batch_size=options.batch_size, device=options.device)
    labeller = None
    if options.vqvae:
        teacher = teacher_from(options.teacher, options.device)
        labeller = labeller_from(teacher, load_vqvae(options.vqvae, options.device))
    named = {key: getattr(options, key) for key in ("dataset", "split_by", "images_dir", "licence", "only")}
    with CachedCaptioner(captioner, options.cache) if options.cache else nullcontext(captioner) as asked:
        return write_joint(
            options.reader,
            options.root,
            options.out,
            asked,
            labeller,
            split=options.split,
            options={key: value for key, value in named.items() if value is not None},
            teacher=options.teacher and Path(options.teacher).name,
            progress=True,
            expressions=options.expressions,
            more=options.more,
            depth_turns=options.depth_turns,
            seed=options.seed,
        )


if __name__ == "__main__":
    sys.exit(main())
