"""Fetch transformers' own common tests, which its wheel lacks, into .cache/transformers-tests/<version>/.

They come out of the source distribution of the installed version, through `pip download`.  Run again, it does nothing;
without a network it says so and ends well: the tests that need them are then skipped with a reason.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "transformers-tests"


def download(release: str, folder: str, timeout: int) -> Path | None:
    """The source distribution in `folder`, or None if pip could not get it."""
    command = [sys.executable, "-m", "pip", "download", f"transformers=={release}", "--dest", folder, "--quiet"]
    command += [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "15",
    ]
    # pip reads the metadata by a build.  With the build tools that are here it needs to fetch none.
    for isolation in (["--no-build-isolation"], []):
        try:
            subprocess.run([*command, *isolation], timeout=timeout, capture_output=True)
        except subprocess.TimeoutExpired:
            return None
        # Saved before its metadata are read, and all that is wanted.
        if archive := next(Path(folder).glob("*.tar.gz"), None):
            return archive
    return None


def unpack(archive: Path, target: Path) -> int:
    """Put the archive's tests/*.py into `target`, which appears at once and whole; returns their number."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tarfile.open(archive) as tar:
        whole = Path(scratch) / "tests"
        whole.mkdir()
        (whole / "__init__.py").touch()  # one of the tests imports the folder by it
        tests = [member for member in tar if member.isfile() and Path(member.name).match("transformers-*/tests/*.py")]
        for member in tests:
            with tar.extractfile(member) as source, open(whole / Path(member.name).name, "wb") as copy:
                shutil.copyfileobj(source, copy)
        whole.rename(target)
    return len(tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", default=version("transformers"), help="release to fetch (default: the installed)")
    parser.add_argument("--timeout", type=int, default=300, help="seconds after which pip is stopped")
    options = parser.parse_args()
    target = CACHE / options.release / "tests"
    if target.is_dir():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching the tests of transformers {options.release} (about 9 MB)")
    with tempfile.TemporaryDirectory() as folder:
        archive = download(options.release, folder, options.timeout)
        if archive is None:
            print("pip could not fetch them (no network?): transformers' common tests will be skipped")
            return
        print(f"{unpack(archive, target)} files in {target}")


if __name__ == "__main__":
    main()
