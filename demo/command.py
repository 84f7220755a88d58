"""`perceptio demo`: the page, on this machine."""

import argparse

from ..cli import add_model_arguments, open_pipeline
from ..extras import extra


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="a page in the browser: drop a picture, ask, and watch the answer being made",
        description="Serves a page on which one drops a picture, asks, and sees the tokens as they are written, the "
        "mask, the depth map and the answer. Stop it with Ctrl+C.",
        epilog="Example: perceptio demo --port 7860",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 lets others in (default: this machine alone)")
    parser.add_argument("--port", type=int, metavar="P", help="default: the first free one from 7860 on")
    parser.set_defaults(run=run)


def run(options) -> int:
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ValueError(f"--port is {options.port}, expected 1 to 65535")
    with extra("demo", "the page needs"):
        from .page import build_page, serve
    serve(build_page(open_pipeline(options)), options.host, options.port)
    return 0
