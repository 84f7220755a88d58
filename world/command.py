"""`perceptio world`: render scenes as a data set, or look at them."""

from pathlib import Path

from ..extras import extra

SPLITS = ("train", "validation", "test", "points3", "points4", "points5", "lure", "refer", "absent")
EPILOG = """Examples:
  perceptio world build scenes --scenes 2000
  perceptio world build scenes --split lure --scenes 200
  perceptio world sheet sheet.png --scenes 24"""


def add_parser(commands) -> None:
    import argparse

    parser = commands.add_parser(
        "world",
        help="render scenes of our own, with exact depth, masks and answers",
        description="Scenes with exact truth and questions on them. The same seed gives the same scenes, whatever the "
        "number of workers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="write a data set of scenes as Parquet shards")
    build.add_argument("out", metavar="DIR", help="folder to write; a split that it has already is not overwritten")
    build.add_argument("--overwrite", action="store_true", help="write a split anew that is there")
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    build.add_argument(
        "--turns", type=int, default=3, metavar="N", help="questions on one picture (default: %(default)s)"
    )
    build.add_argument(
        "--points", type=float, default=0.5, metavar="SHARE",
        help="of the scenes of train, validation and test that also give a picture with marked points (default: "
        "%(default)s)",
    )  # fmt: skip
    build.add_argument(
        "--point-turns", type=int, default=1, metavar="N", help="questions on one of those (default: %(default)s)"
    )
    build.add_argument(
        "--kinds", type=_weights, metavar="KIND=WEIGHT,…",
        help="kinds of questions, each drawn by its weight (default: all)",
    )  # fmt: skip
    build.add_argument(
        "--repeated", type=lambda text: tuple(text.split(",")), metavar="KIND,…",
        help="kinds that one picture may have several questions of (default: refer)",
    )  # fmt: skip
    build.set_defaults(run=run_build)
    sheet = actions.add_parser("sheet", help="draw scenes on one picture: mask, depth, question, answer")
    sheet.add_argument("out", metavar="FILE", help="picture to write, .png or .jpg")
    sheet.add_argument(
        "--columns", type=int, default=4, metavar="N", help="scenes side by side (default: %(default)s)"
    )
    sheet.set_defaults(run=run_sheet, workers=None, turns=1, points=0.5, point_turns=1, kinds=None, repeated=None)
    for action in (build, sheet):
        action.add_argument("--scenes", type=int, default=24, metavar="N", help="how many (default: %(default)s)")
        action.add_argument("--split", choices=SPLITS, default="train", help="kind of scenes (default: %(default)s)")
        action.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        action.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side (default: %(default)s)")


def _weights(text: str) -> dict[str, float]:
    """ "colour=3,refer" → {"colour": 3.0, "refer": 1.0}."""
    from argparse import ArgumentTypeError

    parts = [part.partition("=") for part in text.split(",")]
    try:
        return {kind: float(weight) if equals else 1.0 for kind, equals, weight in parts}
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not of the form colour=3,refer=1: {error}") from error


def _records(options):
    from tqdm import tqdm

    with extra("world", "the world needs"):
        from .records import WorldOptions, world_records
    if options.scenes < 1 or options.seed < 0:
        raise ValueError(f"`--scenes` is {options.scenes} and `--seed` {options.seed}, expected at least 1 and 0")
    asked = {name: getattr(options, name) for name in ("kinds", "repeated") if getattr(options, name) is not None}
    settings = WorldOptions(
        options.size, options.size, options.turns, points=options.points, point_turns=options.point_turns, **asked
    )
    found = world_records(options.scenes, options.seed, options.split, settings, workers=options.workers)
    return tqdm(found, desc=f"rendering {options.split}", unit=" records", disable=None)


def run_build(options) -> int:
    records = _records(options)
    from ..data.card import write_card
    from ..data.shards import write_shards

    manifest = write_shards(records, options.out, split=options.split, overwrite=options.overwrite)
    write_card(options.out, overwrite=True)
    entry = manifest["splits"][options.split]
    print(f"wrote {entry['rows']} records of {options.scenes} scenes to {options.out}")
    return 0


def run_sheet(options) -> int:
    out = Path(options.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{out} ends in {out.suffix!r}, expected .png or .jpg")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} does not exist: create it, or write elsewhere")
    records = list(_records(options))
    from .sheet import contact_sheet

    contact_sheet(records[: options.scenes], options.columns).save(out, quality=88)
    print(f"wrote {out}")
    return 0
