"""Names of files in a person's data, kept inside the folder that the data is in."""

import os
import stat
from pathlib import Path, PureWindowsPath

LONGEST_FILE = 256 << 20


class PathError(ValueError):
    """A name that is not followed: what was found, what was expected, what to change."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(found, expected, remedy)
        self.found, self.expected, self.remedy = found, expected, remedy

    def __str__(self) -> str:
        return f"{self.found}; expected {self.expected}: {self.remedy}"


class OutsideError(PathError):
    """A name that leads out of the folder."""


def locate(root: Path, name) -> Path:
    """The regular file `name` below `root`; anything that leads elsewhere or is no plain file raises `PathError`."""
    inside = f"a file below {root}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise PathError(f"{name!r:.120} ({type(name).__name__})", "the name of a file", "write its path as a text")
    windows = PureWindowsPath(name)
    if os.path.isabs(name) or windows.drive or windows.root or "://" in name[:12] or name.startswith("data:"):
        raise PathError(
            f"{name!r:.120}, which is no relative path", inside, "put the file there, and name it from there"
        )
    if ".." in windows.parts:  # knows both separators
        raise OutsideError(f"{name!r:.120}, which leads out with '..'", inside, "put the file there")
    path = root / name
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: half a surrogate pair
        found = getattr(error, "strerror", None) or "no file name"
        raise PathError(f"{name!r:.120}: {found}", inside, _nearest(path)) from error
    if not path.resolve().is_relative_to(root.resolve()):
        raise OutsideError(f"{name!r:.120}, a link to elsewhere", inside, "copy the file there")
    if not stat.S_ISREG(kind):
        raise PathError(f"{name!r:.120}, which is a folder, device or pipe", "a file", "name a file")
    size = path.stat().st_size
    if not size or size > LONGEST_FILE:
        raise PathError(f"{name!r:.120} of {size} bytes", f"1 to {LONGEST_FILE} bytes", "save or fetch it again")
    return path


def read_file(root: Path, name) -> bytes:
    """The content of the file `name` below `root`."""
    path = locate(root, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathError(
            f"{name!r:.120}: {error.strerror}", "a file that can be read", "change its permissions"
        ) from error


def _nearest(path: Path) -> str:
    """A remedy that names a file which differs in case or ending alone, or the separator of another system."""
    if "\\" in path.name:
        return "write / between folders"
    try:
        names = [entry.name for entry in os.scandir(path.parent)][:10_000]
    except (OSError, ValueError):
        return "check the name and the folder"
    alike = [name for name in names if name.lower() == path.name.lower() or Path(name).stem == path.stem]
    return f"did you mean {alike[0]!r}?" if alike else "check the name"
