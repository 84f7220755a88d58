"""`perceptio push`: a model, a data set or a Space to the Hub, after everything that can be checked has been."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..extras import extra

KINDS = ("model", "dataset", "space")
EPILOG = """Examples:
  perceptio push build/run/model me/perceptio-cups --license apache-2.0 --dry-run
  perceptio push build/run/model me/perceptio-cups --license apache-2.0 --results build/eval/world/results.json
  perceptio push build/scenes me/scenes --type dataset --private"""
PATIENCE = 1800  # seconds for a large model to load and answer
XET_TOKEN = "/xet-write-token/"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a model, a data set or a Space on the Hub",
        description="Builds the repository (weights, code, processor, card, licence, results), refuses pickles, "
        "tokens, keys and names of this machine's folders, loads it in a process that knows this package not, and "
        "uploads it. Run again after an interruption, it goes on. The token is that of `hf auth login` or HF_TOKEN.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the model, of shards, or of the Space")
    parser.add_argument("repo_id", metavar="REPO_ID", help="for example me/perceptio-cups; made if it is not there")
    parser.add_argument("--type", choices=KINDS, help="what FOLDER is (default: what its files say)")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch; made if it is not there")
    parser.add_argument("--private", action="store_true", help="only you can see it; refused where others do already")
    parser.add_argument("--license", metavar="ID", help="such as apache-2.0 (default: what README.md states)")
    parser.add_argument(
        "--results", metavar="FILE", type=Path, action="append", default=[],
        help="results.json of `perceptio eval` on this very model, for card and tables; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--benchmark", metavar="NAME=ID", action="append", default=[],
        help="Hub id of a benchmark's data set, such as world=me/scenes; may be given again",
    )  # fmt: skip
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not load it in a process of its own")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument("--dry-run", action="store_true", help="do all but the upload, and list what would be sent")
    parser.set_defaults(run=run)


def run(options) -> int:
    with extra("data", "pushing needs"):
        from .repository import Wish, build, guess_kind, list_all
        from .secrets_scan import scan_secrets

    kind = guess_kind(options.folder) if options.type is None else options.type
    if not options.folder.is_dir():
        raise FileNotFoundError(f"FOLDER is {options.folder}, expected a folder")
    _check_id(options.repo_id)
    wish = Wish(
        options.repo_id, options.license, tuple(options.results), _datasets(options.benchmark), options.max_shard_size
    )
    with _beside(options.folder) as folder:
        left_out = build(kind, options.folder, folder, wish)
        if problems := scan_secrets(folder, [options.folder.resolve()]):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(f"{options.folder} is not pushed: {problems[0]}{more}")
        if not options.no_verify:
            print(verify(kind, folder))
        files = list_all(folder)
        if options.dry_run:
            print("\n".join(f"{size:>15,}  {name}" for name, size in files.items()))
        print(f"{len(files)} files, {sum(files.values()) / 1e6:,.1f} MB, for the {kind} {options.repo_id}")
        if left_out:
            print(f"left out: {', '.join(left_out)}")
        if not options.dry_run:
            print(f"pushed to {upload(kind, folder, options)}")
    return 0


def _check_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"REPO_ID is {repo_id!r}, expected owner/name ({error})") from error
    if "/" not in repo_id:
        raise ValueError(f"REPO_ID is {repo_id!r}, expected owner/name, for example me/{repo_id}")


def _datasets(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if wrong := [name for name, dataset in found.items() if "/" not in dataset]:
        raise ValueError(f"`--benchmark` is {wrong[0]!r}, expected NAME=OWNER/DATASET, for example world=me/scenes")
    return found


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk, where large files can be linked; elsewhere if that cannot be written."""
    parent = folder.resolve().parent
    made = tempfile.mkdtemp(
        prefix=f".{folder.resolve().name}.push-", dir=parent if os.access(parent, os.W_OK) else None
    )
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def verify(kind: str, folder: Path) -> str:
    """Load the repository as a stranger does, and say what was seen; raises with the stranger's last words."""
    if kind == "space":
        return "the app is a Python file; it was not run"
    if (folder / "adapter_config.json").is_file():
        return "the adapter was not loaded: its base is not here"
    code = (Path(__file__).parent / "fresh_process.py").read_text("utf-8")
    with tempfile.TemporaryDirectory() as home:
        own = {name: value for name, value in os.environ.items() if not ("TOKEN" in name or name.startswith("HF_"))}
        environment = own | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, kind, str(folder)], cwd=home, env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"a process without this package took more than {PATIENCE} seconds: pass --no-verify to do without"
            ) from error
    if done.returncode:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise ValueError(f"nothing is pushed: a process without this package cannot use the repository ({said})")
    seen = json.loads(done.stdout.splitlines()[-1])
    return "without this package: " + ", ".join(f"{name} {value}" for name, value in seen.items())


def upload(kind: str, folder: Path, options) -> str:
    """Address of the commit.  What was sent before an interruption is not sent again."""
    from huggingface_hub import HfApi

    from .. import __version__
    from .repository import STALE

    api = HfApi(library_name="perceptio", library_version=__version__)
    where = {"repo_id": options.repo_id, "repo_type": kind}
    branch = None if options.revision == "main" else options.revision
    with _explained(options.repo_id):
        sdk = {"space_sdk": _sdk(folder)} if kind == "space" else {}
        api.create_repo(**where, **sdk, private=options.private or None, exist_ok=True)
        is_private = api.repo_info(**where).private
    if options.private and not is_private:
        raise ValueError(
            f"{options.repo_id} is public already, and --private does not change that: make it private on the Hub "
            "first, or push without --private"
        )
    with _explained(options.repo_id):
        if branch is not None:
            api.create_branch(**where, branch=branch, exist_ok=True)
        done = api.upload_folder(
            **where,
            folder_path=folder,
            revision=branch,
            commit_message=options.message or f"Push with perceptio {__version__}",
            delete_patterns=STALE[kind],
        )
        _check_arrival(api, where, branch, folder)
    return done.commit_url


def _sdk(folder: Path) -> str:
    from huggingface_hub import RepoCard

    return RepoCard.load(folder / "README.md").data["sdk"]


def _check_arrival(api, where: dict, branch: str | None, folder: Path) -> None:
    """Every file is there, in its size, and of large ones in its content."""
    from ..data.manifest import sha256
    from .repository import list_all

    there = {entry.path: entry for entry in api.list_repo_tree(**where, revision=branch, recursive=True)}
    for name, size in list_all(folder).items():
        entry = there.get(name)
        large = getattr(entry, "lfs", None)
        if getattr(entry, "size", None) != size or (large and large.sha256 != sha256(folder / name)):
            raise OSError(f"{name} did not arrive as it is here")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{repo_id} is not pushed, or not whole ({explain_push(error)}): run the same command again, what was "
            "sent before is not sent again"
        ) from error


def explain_push(error: Exception) -> str:
    """Why the Hub did not take something, in a few words."""
    from huggingface_hub import constants

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of a file that could not be sent
    status = getattr(getattr(error, "response", None), "status_code", None)
    if XET_TOKEN in str(error) and "404" in str(error):
        return f"{constants.ENDPOINT} has no Xet storage, which the client takes for granted: set HF_HUB_DISABLE_XET=1"
    if status in (401, 403):
        return f"the Hub refuses the token with {status}: log in with `hf auth login`, or set HF_TOKEN"
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("httpx"):
        return f"no connection to {constants.ENDPOINT}: {first}"
    return f"{type(error).__name__}: {getattr(error, 'server_message', None) or first}"


def check_base_is_public(base: str) -> None:
    """An adapter is pushed with the name of its base, so that must be a Hub id."""
    if Path(base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise ValueError(
            f"an adapter of {base} is not pushed: nobody else has that folder, so push it with `hf upload` and train "
            "from its Hub id, or write a whole model with `merge`"
        )
