"""`perceptio eval`: how good a model is on a benchmark."""

import argparse
import hashlib
import sys
from pathlib import Path

from ..cli import MODES, UNTRAINED, add_model_arguments, open_pipeline
from ..extras import extra
from . import BENCHMARKS, CODES

EPILOG = """Examples:
  perceptio eval world --model perceptio-8b --data scenes --out build/eval/world
  perceptio eval refcoco --split testA --model perceptio-8b --data refer --out build/eval/refcoco-testA
  perceptio eval world --model perceptio-8b --data scenes --out build/eval/random --depth-codes random"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a model on a benchmark",
        description="Asks every question of a benchmark and writes the predictions, all figures with their intervals, "
        "and a page with the best and the worst. Run again after an interruption, it goes on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", metavar="NAME", choices=BENCHMARKS, help=f"one of {', '.join(BENCHMARKS)}")
    add_model_arguments(parser)
    parser.add_argument("--data", metavar="DIR", required=True, help="folder of the benchmark's data")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--split", metavar="S", help="as it is published (default: the benchmark's first)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="questions at a time (default: %(default)s)"
    )
    parser.add_argument("--perception", choices=MODES, help="what to see (default: what each question asks for)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="room for depth span and answer")
    parser.add_argument(
        "--depth-codes",
        choices=CODES,
        default="own",
        help="what stands in the depth span: the model's own codes, or others, to see whether the answer rests on "
        "them: random, constant, another picture's, those of the true depth (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options) -> int:
    with extra("eval", "evaluation needs"):
        from .benchmark import open_benchmark
        from .predict import Predictor
        from .run import PAGE, Settings, check_request, run_benchmark, table

        benchmark = open_benchmark(options.benchmark)
    names = ("limit", "batch_size", "perception", "max_new_tokens", "depth_codes")
    settings = Settings(split=options.split or benchmark.splits[0], **{name: getattr(options, name) for name in names})
    check_request(benchmark, settings, options.data)
    pipe = open_pipeline(options)
    predictor = Predictor(pipe, benchmark.answer_tokens, options.max_new_tokens, options.depth_codes)
    facts = {"model": model_hash(pipe), "device": pipe.device.type, "dtype": str(pipe.model.dtype)}
    results = run_benchmark(benchmark, predictor, options.data, options.out, settings, facts, progress=True)
    if getattr(pipe.model.config, "untrained", False):
        print(UNTRAINED)
    print(table(results))
    for reason, count in results["invalid"].items():
        print(f"invalid: {count} × {reason}", file=sys.stderr)
    print(f"wrote {Path(options.out) / PAGE}", file=sys.stderr)
    return 0


def model_hash(pipe) -> str:
    """Of the model's folder; of a model of the Hub, its revision."""
    folder = Path(pipe.model.name_or_path)
    if not folder.is_dir():
        return str(getattr(pipe.model.config, "_commit_hash", None) or pipe.model.name_or_path)
    return folder_hash(folder)


def folder_hash(folder: Path) -> str:
    """Of every file of a model's folder that may decide what it says."""
    from ..data.manifest import sha256
    from ..hub.card import EVALUATION, EVALUATIONS
    from ..hub.manifest import list_files

    digest = hashlib.sha256()
    for name in list_files(folder):
        if not name.endswith((".md", ".png", ".jpg")) and not name.startswith((EVALUATION, f"{EVALUATIONS}/")):
            digest.update(f"{name}\0{sha256(folder / name)}\n".encode())
    return digest.hexdigest()[:16]
