"""`perceptio data`: what is wrong with a data set, and what the model will see of it."""

import argparse
import json
import sys
from pathlib import Path

from ..extras import extra

EPILOG = """Examples:
  perceptio data check my_data
  perceptio data preview my_data --out page.html
  perceptio data check my_org/my_set --download --column question=prompt --column answer=reply"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="check a data set, and see what the model will see of it",
        description="A data set is a folder with a JSONL file (image, question, answer, and where there are any mask "
        "and depth), the Hub's folder form (images with metadata.jsonl), shards written here, or a data set's id.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say all that is wrong; exit code 1 when something is")
    check.add_argument("--json", metavar="FILE", help="write the whole report as JSON")
    check.set_defaults(run=run_check)
    preview = actions.add_parser("preview", help="write a page with pictures, masks, depth and token sequences")
    preview.add_argument("--out", metavar="FILE", required=True, help="the page to write, e.g. page.html")
    preview.add_argument("--model", metavar="DIR", help="a model folder: shows its exact tokens and depth codes")
    preview.add_argument("--count", type=int, default=24, metavar="N", help="rows to show (default: %(default)s)")
    preview.set_defaults(run=run_preview)
    for action in (check, preview):
        action.add_argument("data", metavar="DATA", help="folder, .jsonl file, or id of a data set")
        action.add_argument("--split", help="read this split alone")
        action.add_argument(
            "--column", action="append", default=[], metavar="OURS=THEIRS", help="a column under another name; repeat"
        )
        action.add_argument("--download", action="store_true", help="fetch a data set that is not on this machine")
        action.add_argument("--max-pixels", type=int, default=64_000_000, metavar="N", help="largest picture allowed")


def _options(options) -> dict:
    with extra("data", "data sets need"):
        import datasets  # noqa: F401
        import pycocotools  # noqa: F401
    pairs = [pair.partition("=") for pair in options.column]
    wrong = next((pair for pair in pairs if not pair[0] or not pair[2]), None)
    if wrong:
        raise ValueError(f"`--column` is {''.join(wrong)!r}, expected OURS=THEIRS, as in question=prompt")
    return {
        "split": options.split,
        "columns": {ours: theirs for ours, _, theirs in pairs} or None,
        "allow_download": options.download,
        "max_pixels": options.max_pixels,
    }


def run_check(options) -> int:
    settings = _options(options)
    from .check import check_data

    report = check_data(options.data, progress=True, **settings)
    if options.json:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8", errors="replace")
    for line in report.lines():
        print(line)
    return 0 if report.good else 1


def run_preview(options) -> int:
    settings = _options(options)
    from .page import write_preview

    report = write_preview(options.data, options.out, options.model, options.count, **settings)
    print(f"wrote {options.out}: {report.kept} records")
    if not report.good:
        print(f"{len(report.problems)} problems on the way; see the page", file=sys.stderr)
    return 0
