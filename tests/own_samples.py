"""A person's own folder, small and good, and sixty ways to break one row of it."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


def png(values, mode=None) -> bytes:
    file = BytesIO()
    Image.fromarray(np.asarray(values), mode).save(file, "PNG")
    return file.getvalue()


def jpeg(width=WIDTH, height=HEIGHT, seed=0, orientation=1, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((width, height))
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = BytesIO()
    picture.save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def npy(values, allow_pickle=False) -> bytes:
    file = BytesIO()
    np.save(file, values, allow_pickle=allow_pickle)
    return file.getvalue()


def box_mask(width=WIDTH, height=HEIGHT, value=255) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[5 : height // 2, 5 : width // 2] = value
    return mask


def ramp(width=WIDTH, height=HEIGHT) -> np.ndarray:
    return np.linspace(1, 60_000, width * height).reshape(height, width).astype(np.uint16)


FILES = {"mask.png": png(box_mask()), "depth.png": png(ramp())}


def good_row(index: int, root: Path) -> dict:
    """Writes the row's picture; mask and depth are files that all rows share."""
    for name, data in FILES.items():
        if not (root / name).exists():
            (root / name).write_bytes(data)
    (root / f"{index}.jpg").write_bytes(jpeg(seed=index))
    row = {"id": f"r{index}", "image": f"{index}.jpg", "question": "Where is the cup?", "answer": "On the left."}
    kind = index % 6
    if kind == 0:
        row["mask"] = "mask.png"
    elif kind == 1:
        row["mask"], row["depth"] = [[5, 5, 20, 5, 20, 15, 5, 15]], "depth.png"
    elif kind == 2:
        row["absent"] = True
    elif kind == 3:
        row["depth"] = "depth.png"
    elif kind == 4:
        row["mask"] = {"size": [HEIGHT, WIDTH], "counts": [100, 7, HEIGHT * WIDTH - 107]}
    return row


def write_rows(root: Path, rows: list, name: str = "train.jsonl") -> Path:
    """Rows are dictionaries, or bytes to be written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (root / name).write_bytes(b"\n".join(lines) + b"\n")
    return root


def _with(**changes):
    return lambda root, row: {**row, **changes}


def _without(name):
    return lambda root, row: {key: value for key, value in row.items() if key != name}


def _file(field, name, data, **more):
    """The row names a file with this content."""

    def broken(root, row):
        (root / name).write_bytes(data)
        return {**row, field: name, **more}

    return broken


def _link(root, row):
    (root.parent / "outside.jpg").write_bytes(jpeg())
    (root / "link.jpg").symlink_to(root.parent / "outside.jpg")
    return {**row, "image": "link.jpg"}


def _pipe(root, row):
    import os

    os.mkfifo(root / "pipe.jpg")
    return {**row, "image": "pipe.jpg"}


def _folder(root, row):
    (root / "folder.jpg").mkdir()
    return {**row, "image": "folder.jpg"}


def _raw(data: bytes):
    return lambda root, row: data


def _talk(*roles, masks=None, **more):
    messages = [{"role": role, "content": "Some words here."} for role in roles]
    extra = {} if masks is None else {"masks": masks}
    return lambda root, row: {"id": row["id"], "image": row["image"], "messages": messages, **extra, **more}


TRIANGLE = [[5, 5, 20, 5, 20, 15]]
MANY = box_mask(value=1)
MANY[0, 0] = 2
PHOTO = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
BEYOND = [{"turn": 1, "mask": TRIANGLE, "offset": 99}]
TURNED = {"answer": "Here.", "question": "Where?"}
# name: (what breaks a row, the field that the problem must name)
FAULTS = {
    "picture missing": (_with(image="nowhere.jpg"), "image"),
    "picture named in another case": (_with(image="MASK.PNG"), "image"),
    "absolute path": (_with(image="/etc/passwd"), "image"),
    "windows path": (_with(image="C:\\x.jpg"), "image"),
    "path with two dots": (_with(image="../outside.jpg"), "image"),
    "two dots in the other separator": (_with(image="..\\outside.jpg"), "image"),
    "link out of the folder": (_link, "image"),
    "pipe": (_pipe, "image"),
    "folder": (_folder, "image"),
    "URL": (_with(image="https://example.org/a.jpg"), "image"),
    "file URL": (_with(image="file:///etc/passwd"), "image"),
    "data URL": (_with(image="data:text/html;base64,AAAA"), "image"),
    "name with NUL": (_with(image="a\0.jpg"), "image"),
    "name of 5000 letters": (_with(image="a" * 5000 + ".jpg"), "image"),
    "name is a number": (_with(image=7), "image"),
    "two pictures": (_with(image=["0.jpg", "1.jpg"]), "image"),
    "empty picture": (_file("image", "empty.jpg", b""), "image"),
    "HTML as picture": (_file("image", "page.png", b"<html>not found</html>"), "image"),
    "SVG": (_file("image", "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "image"),
    "cut JPEG": (_file("image", "cut.jpg", jpeg(400, 300)[:2000]), "image"),
    "bomb": (_file("image", "bomb.png", png(np.zeros((9000, 9000), np.uint8))), "image"),
    "question missing": (_without("question"), "question"),
    "answer missing": (_without("answer"), "answer"),
    "question is a number": (_with(question=5), "question"),
    "answer is a list": (_with(answer=["a"]), "answer"),
    "answer is blank": (_with(answer=" \n"), "answer"),
    "text with NUL": (_with(question="a\0b"), "question"),
    "text too long": (_with(question="word " * 30_000), "question"),
    "unknown key": (_with(anwser="typo"), "anwser"),
    "mask missing": (_with(mask="nowhere.png"), "mask"),
    "mask of another size": (_file("mask", "small.png", png(box_mask(20, 15))), "mask"),
    "mask is a photo": (_file("mask", "photo.png", png(PHOTO)), "mask"),
    "mask of several things": (_file("mask", "many.png", png(MANY)), "mask"),
    "mask is empty": (_file("mask", "black.png", png(np.zeros((30, 40), np.uint8))), "mask"),
    "mask is text": (_file("mask", "text.png", b"hello"), "mask"),
    "absent with a mask": (_with(absent=True, mask=TRIANGLE), "mask"),
    "absent is a word": (_with(absent="yes"), "absent"),
    "polygon of two points": (_with(mask=[[1, 2, 3, 4]]), "mask"),
    "polygon of text": (_with(mask=[["a", 2, 3, 4, 5, 6]]), "mask"),
    "polygon outside the picture": (_with(mask=[[500, 500, 600, 500, 600, 600]]), "mask"),
    "run lengths of another size": (_with(mask={"size": [10, 10], "counts": [0, 100]}), "mask"),
    "run lengths that overrun": (_with(mask={"size": [30, 40], "counts": [0, 5000]}), "mask"),
    "negative run length": (_with(mask={"size": [30, 40], "counts": [5, -5, 1200]}), "mask"),
    "run lengths of nonsense": (_with(mask={"size": [30, 40], "counts": "\x01\x02"}), "mask"),
    "mask drawn before EXIF": (
        lambda root, row: _file("mask", "turned.png", png(box_mask()))(
            root, {**_file("image", "turned.jpg", jpeg(orientation=6))(root, row)}
        ),
        "mask",
    ),
    "mask on a turned square": (
        lambda root, row: _file("mask", "square.png", png(box_mask(30, 30)))(
            root, {**_file("image", "square.jpg", jpeg(30, 30, orientation=6))(root, row)}
        ),
        "mask",
    ),
    "polygon on a turned picture": (
        lambda root, row: {**_file("image", "turned2.jpg", jpeg(orientation=8))(root, row), "mask": TRIANGLE},
        "mask",
    ),
    "depth missing": (_with(depth="nowhere.png"), "depth"),
    "depth in colours": (_file("depth", "colour.png", png(np.zeros((30, 40, 3), np.uint8))), "depth"),
    "depth with pickle": (_file("depth", "p.npy", npy(np.array([{}], object), True)), "depth"),
    "depth infinite": (_file("depth", "inf.npy", npy(np.full((30, 40), np.inf))), "depth"),
    "depth negative": (_file("depth", "neg.npy", npy(np.full((30, 40), -1.0))), "depth"),
    "depth without a value": (_file("depth", "hole.png", png(np.zeros((30, 40), np.uint16))), "depth"),
    "depth of another shape": (_file("depth", "wide.png", png(ramp(40, 10))), "depth"),
    "depth of an unknown kind": (_with(depth="depth.png", depth_kind="feet"), "depth_kind"),
    "line cut off": (_raw(b'{"image": "0.jpg", "question": "Wh'), "line"),
    "line is a list": (_raw(b"[1, 2]"), "line"),
    "line with NaN": (_raw(b'{"image": "0.jpg", "question": NaN, "answer": "a"}'), "line"),
    "line with a key twice": (_raw(b'{"question": "a", "question": "b", "answer": "c"}'), "line"),
    "line is no UTF-8": (_raw(b'{"question": "\xff\xfe", "answer": "a"}'), "line"),
    "id twice": (_with(id="r0"), "id"),
    "two users in a row": (_talk("user", "user"), "messages"),
    "messages is a text": (lambda root, row: {"id": row["id"], "messages": "hi"}, "messages"),
    "mask of a question": (_talk("user", "assistant", masks=[{"turn": 0, "mask": TRIANGLE}]), "masks[0].turn"),
    "two masks at one place": (
        _talk("user", "assistant", masks=[{"turn": 1, "mask": TRIANGLE}, {"turn": 1, "mask": TRIANGLE}]),
        "masks",
    ),
    "mask beyond the answer": (_talk("user", "assistant", masks=BEYOND), "masks[0].offset"),
    "mask without a picture": (lambda root, row: {"id": row["id"], "mask": TRIANGLE, **TURNED}, "image"),
}  # fmt: skip
