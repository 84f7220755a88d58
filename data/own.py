"""A person's own rows → records.

image       name of a picture below the folder                       (`file_name` in the Hub's form)
question, answer
mask        name of a PNG, polygons [[x, y, …], …], or run lengths   (`mask_file_name`)
depth       name of a 16-bit PNG, float TIFF or NPY                  (`depth_file_name`)
absent      true: what is asked for is not in the picture
depth_kind  "inverse" (larger is nearer, the default) or "metres"
mask_orientation  "shown" or "stored": how the picture stood when the mask was drawn, if EXIF rotates it
messages    [{"role", "content"}, …] and masks [{"turn", "mask", "offset"?}, …] in place of question, answer, mask
id, split, licence, source
"""

import difflib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..processing_perceptio import MAX_IMAGE_PIXELS
from .depths import KINDS, DepthError, encode_depth, read_depth
from .masks import MaskError, area, encode_mask, rle_from_coco, rle_from_picture, transpose
from .paths import PathError, read_file
from .record import OPENING, TURNED, Problem, assistant, make_record, stored_size, user
from .validate import check_record

ALIASES = {
    "file_name": "image",
    "images": "image",
    "mask_file_name": "mask",
    "depth_file_name": "depth",
    "conversations": "messages",
}
SPEAKERS = {"human": "user", "gpt": "assistant"}
KEYS = (
    "image", "question", "answer", "mask", "depth", "absent", "depth_kind", "mask_orientation", "messages", "masks",
    "id", "split", "licence", "source", "extra",
)  # fmt: skip
ORIENTATIONS = ("shown", "stored")
IN_WORDS = {"messages[0].content": "question", "messages[1].content": "answer", "masks[0]": "mask"}


class _Unread(Exception):
    """The rest of a row cannot be looked at."""


class RowReader:
    """Turns rows into records.  `problems` and `warnings` collect what is wrong with each; reading goes on."""

    def __init__(
        self,
        root: Path | None,
        file: str,
        *,
        columns: dict[str, str] | None = None,
        split: str = "train",
        source: str = "own",
        licence: str = "unknown",
        max_pixels: int = MAX_IMAGE_PIXELS,
    ):
        self.root, self.file, self.max_pixels = root, file, max_pixels
        self.defaults = {"split": split, "source": source, "licence": licence}
        self.renamed = {theirs: ours for ours, theirs in (columns or {}).items()}

    def read(self, row: int, content: dict) -> tuple[dict | None, list[Problem], list[Problem]]:
        """(record or None, problems, warnings) of one row."""
        reading = _Reading(self, row)
        try:
            record = reading.record(reading.named(content))
        except _Unread:
            record = None
        return (None if reading.problems else record), reading.problems, reading.warnings


class _Reading:
    """One row while it is read."""

    def __init__(self, reader: RowReader, row: int):
        self.reader, self.row = reader, row
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.data = b""
        self.frame = (0, 0, 1)  # width, height, orientation as stored

    def bad(self, field: str, found, expected: str, remedy: str) -> None:
        self.problems.append(Problem(self.reader.file, self.row, field, str(found), expected, remedy))

    def warn(self, field: str, found, expected: str, remedy: str) -> None:
        self.warnings.append(Problem(self.reader.file, self.row, field, str(found), expected, remedy))

    # The row

    def named(self, content: dict) -> dict:
        """The row under our own keys."""
        row = {}
        for key, value in content.items():
            name = self.reader.renamed.get(key) or ALIASES.get(key, key)
            if name not in KEYS:
                if self.reader.renamed:
                    continue  # with a map of columns the others are not meant
                near = difflib.get_close_matches(str(name), [*KEYS, *ALIASES], 1)
                self.bad(
                    str(key)[:60],
                    "an unknown key",
                    ", ".join(KEYS),
                    f"did you mean {near[0]!r}?" if near else "remove it",
                )
            elif value is not None:
                row[name] = value
        return row

    def record(self, row: dict) -> dict | None:
        for name in ("id", "split", "licence", "source", "question", "answer"):
            if name in row and not isinstance(row[name], str) and not (name == "id" and type(row[name]) is int):
                self.bad(name, f"{row[name]!r:.60} ({type(row[name]).__name__})", "a text", "put it in quotes")
        for name, allowed in (("depth_kind", KINDS), ("mask_orientation", ORIENTATIONS), ("absent", (True, False))):
            if name in row and row[name] not in allowed:
                self.bad(name, f"{row[name]!r:.60}", " or ".join(map(str, allowed)), "choose one of them")
        messages = self._messages(row)
        image = self._image(row)
        masks = self._masks(row, messages) if image is not None else self._without_picture(row)
        depth = self._depth(row) if image is not None and "depth" in row else None
        if self.problems:
            return None
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                message["perception"] = self._perception(turn, messages, masks, depth)
        record = make_record(
            id=str(row.get("id", f"{Path(self.reader.file).stem}-{self.row}")),
            image=image,
            messages=messages,
            masks=masks,
            depth=depth,
            extra=row.get("extra") if isinstance(row.get("extra"), dict) else None,
            **{name: row.get(name, default) for name, default in self.reader.defaults.items()},
        )
        plain = "messages" not in row
        for problem in check_record(record, self.reader.file, self.row, max_pixels=self.reader.max_pixels):
            field = IN_WORDS.get(problem.field, problem.field) if plain else problem.field
            self.bad(field, problem.found, problem.expected, problem.remedy)
        return record

    @staticmethod
    def _perception(turn: int, messages: list, masks: list, depth) -> str:
        first = turn == next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        seg = any(mask["turn"] == turn and mask["offset"] == OPENING for mask in masks)
        modes = [name for name, wanted in (("seg", seg), ("depth", depth is not None and first)) if wanted]
        return "+".join(modes) or "none"

    # Text

    def _messages(self, row: dict) -> list[dict]:
        if "messages" not in row:
            for name in ("question", "answer"):
                if name not in row:
                    self.bad(name, "nothing", "a text", f"write the {name}, or `messages` with several turns")
            return [user(row.get("question", "")), assistant(row.get("answer", ""))]
        if "question" in row or "answer" in row:
            self.bad("messages", "`messages` beside `question` or `answer`", "one of the two", "leave one out")
        found = row["messages"]
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found) or not found:
            self.bad(
                "messages", f"{found!r:.60}", 'a list of {"role", "content"}', "write question and answer in turn"
            )
            raise _Unread
        messages = []
        for index, message in enumerate(found):
            if "from" in message:
                message = {"role": SPEAKERS.get(message["from"], message["from"]), "content": message.get("value")}
                if isinstance(message["content"], str):
                    message["content"] = message["content"].replace("<image>", "").strip()
            extra = set(message) - {"role", "content", "perception"}
            if extra:
                self.bad(
                    f"messages[{index}]", f"the keys {sorted(map(str, extra))}", "role and content", "remove them"
                )
            messages.append({"role": message.get("role"), "content": _text_of(message.get("content"))})
        return messages

    # Picture

    def _image(self, row: dict) -> dict | None:
        if "image" not in row:
            return None
        source = row["image"]
        if isinstance(source, list):  # as chat data sets have it
            if not source:
                return None
            if len(source) > 1:
                self.bad("image", f"{len(source)} pictures", "one", "write a row for each, or choose one")
                raise _Unread
            source = source[0]
        try:
            self.data, name = self._bytes(source)
        except PathError as error:
            self.bad("image", error.found, error.expected, error.remedy)
            raise _Unread from None
        try:
            self.frame = stored_size(self.data)
        except Exception:  # a damaged header raises nearly anything; the validator says it in words
            self.frame = (0, 0, 1)
        width, height, _ = self.frame
        if width * height > self.reader.max_pixels or not width:
            record = make_record(
                id="x", image=self.data, messages=[user("q"), assistant("a")], source="x", licence="x"
            )
            for problem in check_record(record, max_pixels=self.reader.max_pixels):
                self.bad("image", problem.found, problem.expected, problem.remedy)
            raise _Unread
        return {"bytes": self.data, "path": name}

    def _bytes(self, source) -> tuple[bytes, str | None]:
        """(content, name) of a file: a name below the root, or what a table holds."""
        if isinstance(source, Image.Image):
            file = BytesIO()
            source.save(file, "PNG")
            return file.getvalue(), None
        if isinstance(source, (bytes, bytearray)):
            return bytes(source), None
        if isinstance(source, dict) and isinstance(source.get("bytes"), (bytes, bytearray)):
            return bytes(source["bytes"]), source.get("path")
        source = source.get("path") if isinstance(source, dict) else source
        if self.reader.root is None:
            raise PathError(
                f"the name {source!r:.80}", "the picture itself", "store pictures in the table (`Image()`)"
            )
        return read_file(self.reader.root, source), Path(source).name

    def _shown(self) -> tuple[int, int]:
        """(height, width) as a person sees it."""
        width, height, orientation = self.frame
        return (width, height) if orientation in TURNED else (height, width)

    # Masks

    def _without_picture(self, row: dict) -> list:
        for name in ("mask", "masks", "depth", "absent"):
            if name in row:
                self.bad("image", f"nothing, beside `{name}`", "a picture", "name the picture that it belongs to")
        return []

    def _masks(self, row: dict, messages: list) -> list[dict]:
        if "masks" in row:
            if "mask" in row:
                self.bad("masks", "`masks` beside `mask`", "one of the two", "leave one out")
            return self._several(row["masks"], messages, row.get("mask_orientation"))
        turn = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), 1)
        if "mask" not in row:
            if not row.get("absent"):
                return []
            return [{"turn": turn, "offset": OPENING, **encode_mask(np.zeros(self._shown(), bool))}]
        rle = self._mask(row["mask"], "mask", row.get("mask_orientation"))
        if rle is None:
            return []
        self._check_absent(rle, "mask", row.get("absent", False))
        return [{"turn": turn, "offset": OPENING, **rle}]

    def _several(self, found, messages: list, orientation) -> list[dict]:
        masks = []
        if not isinstance(found, list):
            self.bad("masks", f"{found!r:.60}", 'a list of {"turn", "mask"}', "write [] when there is none")
            return masks
        for index, entry in enumerate(found):
            where = f"masks[{index}]"
            unknown = set(entry) - {"turn", "mask", "offset", "absent"} if isinstance(entry, dict) else {"?"}
            if unknown:
                self.bad(where, f"{entry!r:.60}", '{"turn", "mask", "offset", "absent"}', "write it so")
                continue
            absent = entry.get("absent", False)
            empty = encode_mask(np.zeros(self._shown(), bool))
            rle = empty if absent and "mask" not in entry else self._mask(entry.get("mask"), where, orientation)
            if rle is not None:
                self._check_absent(rle, where, absent)
                masks.append({"turn": entry.get("turn"), "offset": entry.get("offset", OPENING), **rle})
        if all(isinstance(mask[name], int) for mask in masks for name in ("turn", "offset")):
            masks.sort(key=lambda mask: (mask["turn"], mask["offset"]))
        return masks

    def _check_absent(self, rle: dict, where: str, absent) -> None:
        pixels = area(rle)
        if not pixels and not absent:
            self.bad(
                where, "an empty mask", "at least one pixel", "draw it, or write `absent: true` for what is not there"
            )
        elif pixels and absent:
            self.bad(
                where,
                f"{pixels} pixels of something absent",
                "no pixel",
                "leave the mask out, or write `absent: false`",
            )

    def _mask(self, source, where: str, orientation: str | None) -> dict | None:
        width, height, turn = self.frame
        stored, shown = (height, width), self._shown()
        try:
            if isinstance(source, list):
                if turn != 1 and orientation is None:
                    return self._ask_orientation(where, "polygons")
                return self._turned(rle_from_coco(source, stored if orientation == "stored" else shown), orientation)
            if isinstance(source, dict) and "counts" in source:
                size = source.get("size")
                return self._placed(size, where, orientation, lambda wanted: rle_from_coco(source, wanted))
            data, _ = self._bytes(source)
            with Image.open(BytesIO(data), formats=("PNG", "BMP", "TIFF")) as picture:
                size = (picture.height, picture.width)
            return self._placed(size, where, orientation, lambda wanted: rle_from_picture(data, wanted))
        except PathError as error:
            self.bad(where, error.found, error.expected, error.remedy)
        except MaskError as error:
            self.bad(where, error, "a mask of the picture", "draw or encode it again")
        except Exception as error:  # what Image.open makes of a file that is no picture
            self.bad(where, f"no picture that can be read ({str(error)[:80]})", "a PNG", "save it as PNG")
        return None

    def _placed(self, size, where: str, orientation: str | None, read) -> dict | None:
        """A mask whose own size says, or fails to say, how the picture stood when it was drawn."""
        width, height, turn = self.frame
        stored, shown = (height, width), self._shown()
        found = tuple(size) if isinstance(size, (list, tuple)) else size
        if orientation is None and turn != 1:
            if found == stored != shown:
                self.bad(
                    where,
                    f"{width} × {height} pixels, drawn before EXIF turned the picture to {shown[1]} × {shown[0]}",
                    "a mask of the picture as it is shown",
                    'redraw it, or write `mask_orientation: "stored"`',
                )
                return None
            if stored == shown:
                return self._ask_orientation(where, "its size")
        return self._turned(read(stored if orientation == "stored" else shown), orientation)

    def _turned(self, rle: dict, orientation: str | None) -> dict:
        return transpose(rle, self.frame[2]) if orientation == "stored" else rle

    def _ask_orientation(self, where: str, by: str) -> None:
        self.bad(
            where,
            f"a picture that EXIF turns (orientation {self.frame[2]}), and {by} cannot tell before or after",
            "`mask_orientation`",
            'write "shown" if the mask fits the picture as viewers show it, "stored" if it fits the raw pixels',
        )

    # Depth

    def _depth(self, row: dict) -> bytes | None:
        kind = row.get("depth_kind", "inverse")
        if kind not in KINDS:
            return None
        try:
            data, name = self._bytes(row["depth"])
            values = read_depth(data, f"the depth map {name or ''}".strip(), kind)
        except PathError as error:
            self.bad("depth", error.found, error.expected, error.remedy)
            return None
        except DepthError as error:
            self.bad("depth", error, "a depth map", "save it as 16-bit PNG, TIFF of floats or NPY")
            return None
        shown, stored = self._shown(), self.frame[1::-1]
        if values.shape == stored != shown:
            self.bad(
                "depth",
                f"{values.shape[1]} × {values.shape[0]} pixels, as before EXIF turned the picture",
                f"a map of the picture as it is shown, {shown[1]} × {shown[0]}",
                "compute it on the picture as it is shown",
            )
            return None
        known = values[np.isfinite(values)]
        if np.ptp(known) == 0:
            self.warn("depth", "one value everywhere", "near and far", "nothing can be learned from it: leave it out")
        if len(known) < 0.5 * values.size:
            self.warn(
                "depth",
                f"{values.size - len(known)} of {values.size} pixels without a value",
                "most of them",
                "check the file",
            )
        return encode_depth(values)


def _text_of(content):
    """The text of a message that is given as parts, without its picture parts."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
