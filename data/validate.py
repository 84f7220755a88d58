"""Everything that can be wrong with one record, found in one pass and with one decoding of its picture."""

import json
from collections.abc import Iterable, Iterator

from ..processing_perceptio import MAX_IMAGE_PIXELS, PERCEPTION_MODES, PictureError, load_picture
from .depths import DepthError, decode_depth
from .masks import MaskError, check_rle
from .record import COLUMNS, OPENING, Problem

ROLES = ("system", "user", "assistant")
LONGEST_TEXT = 100_000


class _Finder:
    """Collects the problems of one row."""

    def __init__(self, file: str, row: int | None):
        self.file, self.row, self.problems = file, row, []

    def __call__(self, field: str, found, expected: str, remedy: str) -> None:
        self.problems.append(Problem(self.file, self.row, field, str(found), expected, remedy))


def check_record(
    record: dict,
    file: str = "",
    row: int | None = None,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    num_codes: int | None = None,
    span_length: int | None = None,
    codebook: str | None = None,
    decode: bool = True,
) -> list[Problem]:
    """All problems of one record, none when it is good.

    num_codes, span_length, codebook: what the model's depth tokenizer has; codes are compared with them when given.
    decode: look at the picture; without it neither the picture nor the sizes of masks and depth are checked.
    """
    found = _Finder(file, row)
    if not isinstance(record, dict) or set(record) - set(COLUMNS) or {"image", "messages", "masks"} - set(record):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        found("record", keys, f"the columns {', '.join(COLUMNS)}", "build it with `make_record`")
        return found.problems
    for field in ("id", "source", "licence", "split"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            found(field, repr(record.get(field)), "a text", f"name the {field}")
    _check_extra(record, found)
    _check_messages(record["messages"], found)
    size = _check_picture(record["image"], found, max_pixels) if decode else None
    if not found.problems:
        _check_masks(record, size, found)
        _check_depth(record, size, found, num_codes, span_length, codebook)
    return found.problems


def check_records(records: Iterable[dict], file: str = "", **options) -> Iterator[tuple[dict, list[Problem]]]:
    """Each record with its problems; an id that was there before is one."""
    seen: dict[str, int] = {}
    for row, record in enumerate(records):
        problems = check_record(record, file, row, **options)
        first = seen.setdefault(record.get("id"), row)
        if first != row:
            problems.append(
                Problem(file, row, "id", f"{record.get('id')!r}, as in row {first}", "one of its own", "rename one")
            )
        yield record, problems


def _check_extra(record: dict, found: _Finder) -> None:
    text = record.get("extra")
    try:
        good = text is None or isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        good = False
    if not good:
        found("extra", f"{text!r:.80}", "a JSON object as text", 'write "{}" when there is nothing')


def _check_messages(messages, found: _Finder) -> None:
    if not isinstance(messages, list) or not messages:
        found("messages", f"{messages!r:.80}", "a question and an answer", "write at least two messages")
        return
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            found(f"{where}.role", repr(role), ", ".join(ROLES), "name the speaker")
        if not isinstance(content, str):
            found(f"{where}.content", f"{content!r:.80}", "a text", "write the text of the message")
        else:
            _check_text(content, role, f"{where}.content", found)
        perception = message.get("perception") if isinstance(message, dict) else None
        allowed = tuple(PERCEPTION_MODES) if role == "assistant" else (None,)
        if perception not in allowed:
            names = ", ".join(map(str, allowed))
            found(f"{where}.perception", repr(perception), names, "say what the answer opens with")
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    turns = roles[1:] if roles and roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        found(
            "messages", " ".join(map(str, roles)), "user and assistant in turn, ending with assistant", "reorder them"
        )


def _check_text(text: str, role: str, where: str, found: _Finder) -> None:
    if role == "assistant" and not text.strip():
        found(where, f"{text!r:.40}", "an answer", "write what the model shall answer")
    if len(text) > LONGEST_TEXT:
        found(where, f"{len(text)} characters", f"at most {LONGEST_TEXT}", "shorten it, or split the record")
    if "\x00" in text:
        found(where, "a NUL character", "text", "take it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        found(where, "half of a surrogate pair", "Unicode text", "save the file as UTF-8")


def _check_picture(image, found: _Finder, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) of the picture as it is shown."""
    if image is None:
        return None
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, (bytes, bytearray)):
        found("image", f"{type(data).__name__}", "the bytes of a picture file", "read the file into the record")
        return None
    try:
        picture = load_picture(data, max_pixels)
    except PictureError as error:
        found("image", error, "a picture", "save or fetch it again, or leave the row out")
        return None
    return picture.height, picture.width


def _check_masks(record: dict, size, found: _Finder) -> None:
    messages, masks = record["messages"], record["masks"]
    if not isinstance(masks, list):
        found("masks", type(masks).__name__, "a list", "write [] when there is none")
        return
    if masks and record["image"] is None:
        found("masks", f"{len(masks)} masks and no picture", "a picture", "add it, or take the masks out")
    places = []
    for index, mask in enumerate(masks):
        where = f"masks[{index}]"
        turn, offset = mask.get("turn"), mask.get("offset")
        if not isinstance(turn, int) or not 0 <= turn < len(messages) or messages[turn]["role"] != "assistant":
            found(f"{where}.turn", repr(turn), "the index of an answer in `messages`", "count from 0")
        elif not isinstance(offset, int) or not (
            offset == OPENING or 0 < offset < len(messages[turn]["content"].rstrip())
        ):
            length = len(messages[turn]["content"].rstrip())
            found(
                f"{where}.offset",
                repr(offset),
                f"{OPENING}, or 1 to {length - 1}",
                "place the [SEG] inside the answer",
            )
        else:
            places.append((turn, offset))
        try:
            check_rle(mask.get("size"), mask.get("counts"), size)
        except MaskError as error:
            found(where, error, "a mask of the picture", "encode it again, at the size of the picture as it is shown")
    if places != sorted(places):
        found("masks", f"the places {places}", "the order of their [SEG]", "sort them by turn and offset")
    elif len(set(places)) != len(places):
        found("masks", "two masks at one place", "one mask for each [SEG]", "merge them, or move one")
    for turn, message in enumerate(messages):
        opens = "seg" in (message["perception"] or "")
        if opens != ((turn, OPENING) in places) and len(places) == len(masks):
            state = "opens with [SEG]" if opens else "does not open with [SEG]"
            have = "no mask" if opens else "a mask"
            found(
                f"messages[{turn}].perception",
                f"{message['perception']!r}: the answer {state} and has {have} at its opening",
                "one mask for each [SEG]",
                'give the mask (empty where the thing is absent), or change the mode ("none", "depth")',
            )


def _check_depth(record: dict, size, found: _Finder, num_codes, span_length, codebook) -> None:
    depth, codes = record.get("depth"), record.get("depth_codes")
    if (depth is not None or codes is not None) and record["image"] is None:
        found("depth", "depth and no picture", "a picture", "add it, or take the depth out")
    if depth is not None:
        try:
            data = depth.get("bytes") if isinstance(depth, dict) else None
            values = decode_depth(data if isinstance(data, (bytes, bytearray)) else b"")
        except DepthError as error:
            found("depth", error, "a 16-bit picture", "write it with `encode_depth`")
        else:
            _check_depth_values(values, size, found)
    asks = [turn for turn, message in enumerate(record["messages"]) if "depth" in (message["perception"] or "")]
    if asks and depth is None and codes is None:
        found(f"messages[{asks[0]}].perception", "a depth span and no depth", "a depth map or codes", "add one")
    if codes is not None:
        _check_codes(codes, record.get("depth_codebook"), found, num_codes, span_length, codebook)


def _check_depth_values(values, size, found: _Finder) -> None:
    height, width = values.shape
    if values[values == values].size == 0:
        found("depth", "no valid value", "some", "leave the depth out")
    if size is None:
        return
    # A map may be smaller than its picture; one pixel of rounding on either side is no other shape.
    if abs(height * size[1] - width * size[0]) > size[0] + size[1] or height > size[0] or width > size[1]:
        found(
            "depth",
            f"{width} × {height} pixels",
            f"the picture's {size[1]} × {size[0]}, or smaller in the same proportion",
            "compute it on the picture as it is shown (EXIF rotation applied)",
        )


def _check_codes(codes, codebook, found: _Finder, num_codes, span_length, expected_codebook) -> None:
    if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
        found("depth_codes", f"{codes!r:.60}", "a list of whole numbers", "encode the map again")
        return
    if not codebook:
        found("depth_codebook", repr(codebook), "the hash of the codebook", "write it next to the codes")
    elif expected_codebook is not None and codebook != expected_codebook:
        found(
            "depth_codebook", codebook, f"the model's {expected_codebook}", "label the data with the model's tokenizer"
        )
    length = span_length or round(len(codes) ** 0.5) ** 2
    if not codes or len(codes) != length:
        found("depth_codes", f"{len(codes)} codes", f"{length or 1} (a square grid)", "encode the whole map")
    top = num_codes or 32768
    if codes and not 0 <= min(codes) <= max(codes) < top:
        found("depth_codes", f"codes from {min(codes)} to {max(codes)}", f"0 to {top - 1}", "encode the map again")
