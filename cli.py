"""The command line.  Wrong input ends with one line and exit code 2; a traceback is a bug."""

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from .extras import extra

MODES = ("seg+depth", "seg", "depth", "none")
UNTRAINED = "This model is untrained: its weights are random, so mask, depth and answer mean nothing."


def main(arguments: list[str] | None = None) -> int:
    forgive_encodings()
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        return options.run(options) or 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("perceptio: stopped", file=sys.stderr)
        return 130


def forgive_encodings() -> None:
    """An answer or a sign may be none of the terminal's encoding: a question mark is printed for it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def refuse(error: Exception) -> int:
    """Say in one line what is wrong, and return the exit code of a command that cannot go on."""
    print(f"perceptio: {_one_line(error)}", file=sys.stderr)
    return 2


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perceptio",
        description="A vision-language model that segments and estimates depth before it answers.",
        epilog='Example: perceptio see photo.jpg "Which cup is closer?" --out result.png',
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_see(commands)
    _add_serve(commands)
    _add_doctor(commands)
    _add_others(commands)
    return parser


def _add_others(commands) -> None:
    from perceptio.data import command as data
    from perceptio.demo import command as demo
    from perceptio.evaluation import command as evaluation
    from perceptio.hub import assemble, push
    from perceptio.vqvae import label
    from perceptio.world import command as world

    for module in (assemble, data, demo, evaluation, label, push, world):
        module.add_parser(commands)


def _add_see(commands) -> None:
    parser = commands.add_parser(
        "see",
        help="ask about a picture; get the answer, the mask and the depth map",
        description="Ask about one picture. Prints the answer; --out writes one picture with the photo, the mask over "
        "it and the depth map in colour. Depth is relative inverse depth: 1 is the nearest point of the picture.",
        epilog='Example: perceptio see photo.jpg "Which cup is closer?" --out result.png',
    )
    parser.add_argument("image", metavar="IMAGE", help="path of the picture (PNG, JPEG, WEBP, BMP, TIFF, GIF)")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    add_model_arguments(parser)
    parser.add_argument("--perception", choices=MODES, default="seg+depth", help="what to see (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the result as one picture, e.g. result.png")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object, the mask as RLE")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="room for depth span and answer")
    parser.set_defaults(run=see)


def _add_serve(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI-style chat requests over HTTP",
        description="Serves one model at http://HOST:PORT/v1, for the clients of OpenAI and huggingface_hub. The "
        "answer's message has masks and depth beside the text: docs/serving.md. Nobody is asked for a key.",
        epilog="Example: perceptio serve --model perceptio-8b --port 8000",
    )
    add_model_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="what requests call it (default: the last part of the above)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from http(s) addresses, too")
    parser.set_defaults(run=serve)


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="print what a bug report needs; check a model folder",
        description="Prints versions, device, image backend and attention kernels. With --verify, checks a model "
        "folder against its manifest of checksums, its weight files, and for pickles.",
        epilog="Example: perceptio doctor --verify checkpoints/perceptio-tiny",
    )
    parser.add_argument("--verify", metavar="DIR", help="model folder to check; exit code 1 when something is wrong")
    parser.set_defaults(run=doctor)


def see(options) -> int:
    from perceptio import load_picture

    picture = load_picture(options.image)  # before the model: a wrong path costs no waiting
    if options.out is not None:
        _check_target(Path(options.out))
    question = _whole_text(options.question)
    pipe = open_pipeline(options)
    print("looking …", file=sys.stderr, flush=True)
    result = pipe(image=picture, text=question, perception=options.perception, max_new_tokens=options.max_new_tokens)
    untrained = bool(getattr(pipe.model.config, "untrained", False))
    if options.json:
        whole = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")  # no question marks in what a program reads
        print(json.dumps(_as_json(result, untrained), ensure_ascii=not whole))
    else:
        _print_result(result, options.perception, untrained)
    if options.out is not None:
        _write_picture(picture, question, options.out, result, untrained)
        print(f"wrote {options.out}", file=sys.stderr)
    return 0


def _whole_text(argument: str) -> str:
    """The argument as UTF-8, also where the locale is another: Python then hands over its bytes one by one."""
    try:
        argument.encode("utf-8")
        return argument
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", errors="replace")


def _check_target(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {path} has no known picture ending: use .png or .jpg")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: the folder {path.parent} is not there")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--out {path}: the folder {path.parent} cannot be written, pass another")


def add_model_arguments(parser) -> None:
    """What `open_pipeline` asks for."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="model folder or Hub id (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")


def open_pipeline(options):
    from huggingface_hub import constants
    from transformers import pipeline

    from perceptio import DEFAULT_MODEL, PerceptioForConditionalGeneration, PerceptioPipeline, PerceptioProcessor

    name = options.model or str(DEFAULT_MODEL)
    if options.model is None and not DEFAULT_MODEL.is_dir():
        raise FileNotFoundError(
            f"the model that comes with the package is not in {DEFAULT_MODEL}: install it again, or pass --model DIR"
        )
    device = choose_device(options.device)
    print(f"loading {name} …", file=sys.stderr, flush=True)
    try:
        model = PerceptioForConditionalGeneration.from_pretrained(name, dtype="auto")
        processor = PerceptioProcessor.from_pretrained(name)
    except OSError as error:
        if error.errno is None or Path(name).is_dir():  # without a number it is a sentence of the library
            raise
        raise OSError(
            f"{name} cannot be kept in the cache {constants.HF_HUB_CACHE} ({error}): set HF_HOME to a folder that can "
            "be written and has room"
        ) from error
    return pipeline("perceptio", model=model, processor=processor, pipeline_class=PerceptioPipeline, device=device)


def choose_device(name: str):
    """auto, or the name of a device that is here → torch.device."""
    import torch

    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: pass cpu, or auto for the fastest there is") from error
    return device


def serve(options) -> int:
    with extra("serve", "serving needs"):
        import uvicorn

        from perceptio.serving import Served, build_app
    with _listen(options.host, options.port) as listener:  # before the model: a wrong port costs no waiting
        pipe = open_pipeline(options)
        name = options.name or Path(pipe.model.name_or_path).name
        app = build_app(Served(pipe.model, pipe.processor, name, options.allow_urls))
        host, port = listener.getsockname()[:2]
        print(
            f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", file=sys.stderr, flush=True
        )
        if getattr(pipe.model.config, "untrained", False):
            print(UNTRAINED, file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened on ({error}): pass another") from error


def _as_json(result: dict, untrained: bool) -> dict:
    import numpy as np
    import torch

    from perceptio.processing_perceptio import run_length

    masks = [dict(mask) for mask in result["masks"] or []]
    for mask in masks:
        if mask["mask"] is not None:
            mask["mask"] = run_length(torch.from_numpy(np.asarray(mask["mask"]) > 0))
    kept = {key: result[key] for key in ("generated_text", "score", "object_score", "depth_codes", "problems")}
    return {**kept, "masks": masks, "untrained": untrained}


def _print_result(result: dict, perception: str, untrained: bool) -> None:
    if untrained:
        print(UNTRAINED)
    print(result["generated_text"] or "(no words)")
    for number, mask in enumerate(result["masks"] or [], start=1):
        there = f"object score {mask['object_score']:.2f}"
        if mask["mask"] is None:
            print(f"mask {number}: none, the thing does not seem to be there ({there})")
        else:
            print(f"mask {number}: {mask['area']} pixels, predicted IoU {mask['score']:.2f}, {there}")
    for problem in result["problems"]:
        print(f"problem: {problem}", file=sys.stderr)


def _write_picture(picture, question: str, path: str, result: dict, untrained: bool) -> None:
    from perceptio.drawing import draw_result

    masks = None if result["masks"] is None else [mask["mask"] for mask in result["masks"]]
    depth = None if result["predicted_depth"] is None else result["predicted_depth"].numpy()
    notes = [UNTRAINED] if untrained else []
    drawn = draw_result(picture, question, result["generated_text"], masks=masks, depth=depth, notes=notes)
    try:
        drawn.save(path)
    except OSError as error:
        raise OSError(f"--out {path} cannot be written ({error}): make room, or pass another") from error


def doctor(options) -> int:
    if options.verify is not None:
        return _verify(Path(options.verify))
    from perceptio.doctor import report

    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def _verify(folder: Path) -> int:
    from perceptio.files_perceptio import check_weight_files
    from perceptio.hub.manifest import scan_pickles, verify_manifest

    problems = [*verify_manifest(folder), *scan_pickles(folder)]
    try:
        check_weight_files(folder, expect_float=False)
    except (ValueError, OSError) as error:
        problems.append(_one_line(error))
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(problems)} problems" if problems else f"{folder}: every file is as it was written")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
