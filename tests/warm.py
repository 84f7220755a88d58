"""Processes of Python that need not import the libraries: copies of one that did so once.

They run what `python …` would run, with surroundings, output and exit code of their own.  Where the import itself is
what is tested, or a package is to be absent, a real new process is needed.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from subprocess import CompletedProcess

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.pipelines", "perceptio.train_sft", "perceptio.pipeline_perceptio"])


class Warm:
    """As `subprocess.Popen([sys.executable, *words])` with both outputs caught."""

    def __init__(self, words: list, cwd=None, env: dict | None = None):
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        place, words = Path(self.folder.name), list(map(str, words))
        self.files = place / "out", place / "err"
        if words[0] == "-c":
            words[0] = str(place / "typed.py")
            Path(words[0]).write_text(words.pop(1), encoding="utf-8")
        self.process = CONTEXT.Process(
            target=_act, args=(words, str(cwd or Path.cwd()), dict(os.environ if env is None else env), *self.files)
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self.process.join()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self) -> tuple[str, str]:
        self.wait()
        return tuple(file.read_text("utf-8") if file.exists() else "" for file in self.files)


def run(words: list, cwd=None, env: dict | None = None) -> CompletedProcess:
    process = Warm(words, cwd, env)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    return CompletedProcess(words, process.returncode, out, err)


def place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of where it stands among others."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(number) for name, number in {**numbers, "MASTER_PORT": port}.items()} | {
        "MASTER_ADDR": "127.0.0.1"
    }


def _act(words: list[str], cwd: str, env: dict, out: Path, err: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # asks TMPDIR anew
    multiprocessing.set_start_method(None, force=True)  # as where Python was started
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    code = 0
    try:
        if words[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, cwd if words[0].startswith(str(out.parent)) else str(Path(words[0]).resolve().parent))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
