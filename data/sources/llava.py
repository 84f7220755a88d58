"""LLaVA-1.5's instruction mix, and data sets of the same form.

Published as one JSON array `llava_v1_5_mix665k.json` of {"id", "image", "conversations"} next to the folders of
pictures that `image` names (coco, gqa, ocr_vqa, textvqa, vg); rows of ShareGPT have no picture.  The ids are not
unique there, so that a record is named by its row; the published id is kept in `extra`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..record import DataError, Problem, make_record
from ..tally import Tally
from .common import Unusable, as_dict, convert_rows, read_picture
from .conversations import to_messages
from .json_stream import read_rows

FILE = "llava_v1_5_mix665k.json"


def read_llava(
    root: str | Path,
    *,
    tally: Tally,
    file: str = FILE,
    images: str = "",
    text_only: bool = True,
    source: str = "llava-1.5-665k",
    licence: str = "CC-BY-4.0",
    split: str = "train",
) -> Iterator[dict]:
    """The rows of `root/file` (a JSON array, or JSON lines), with pictures below `root/images`.

    text_only: keep the rows without a picture.
    """
    folder = Path(root) / images
    facts = {"source": source, "licence": licence, "split": split}

    def convert(row, number: int) -> dict:
        name = as_dict(row).get("image")
        picture = None if name is None else read_picture(folder, name)
        return _record(row, number, picture, text_only, facts)

    yield from convert_rows(read_rows(Path(root) / file), convert, tally)


def read_llava_parquet(
    root,
    *,
    tally: Tally,
    files: str = "**/*.parquet",
    text_only: bool = True,
    source: str = "llava",
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """The same form as Parquet below the folder `root`, or as a `datasets.Dataset`: columns image, conversations, id.

    The pictures are the bytes in the column, or files below `root` that it names.
    """
    rows, folder = (
        (_parquet_rows(Path(root), files), Path(root)) if isinstance(root, (str, Path)) else (_as_rows(root), None)
    )
    facts = {"source": source, "licence": licence, "split": split}

    def convert(row, number: int) -> dict:
        return _record(row, number, _column_picture(row.get("image"), folder), text_only, facts)

    yield from convert_rows(rows, convert, tally)


def _record(row: dict, number: int, picture: dict | None, text_only: bool, facts: dict) -> dict:
    if picture is None and not text_only:
        raise Unusable("no picture")
    return make_record(
        id=f"{facts['source']}/{number:07d}",
        image=picture,
        messages=to_messages(row.get("conversations"), picture is not None),
        extra={key: row[key] for key in ("id", "model", "data_source") if isinstance(row.get(key), (str, int))},
        **facts,
    )


def _column_picture(image, folder: Path | None) -> dict | None:
    if image is None:
        return None
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, (bytes, bytearray)):
        return {"bytes": bytes(data), "path": Path(path).name if path else None}
    if folder is None or path is None:
        raise Unusable("no bytes of a picture", f"{image!r:.80}")
    return read_picture(folder, path)


def _parquet_rows(root: Path, files: str) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    paths = sorted(root.glob(files))
    if not paths:
        raise DataError(
            Problem(str(root), None, "files", "no file", f"files {files!r}", "name the folder, or `files`")
        )
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                columns = [name for name in table.schema_arrow.names if name in COLUMNS]
                if "conversations" not in columns:
                    raise DataError(
                        Problem(
                            str(path), None, "columns", str(table.schema_arrow.names), "conversations", "rename it"
                        )
                    )
                for batch in table.iter_batches(batch_size=64, columns=columns, use_threads=False):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(
                Problem(str(path), None, "file", f"not readable ({error})", "a Parquet file", "fetch it again")
            ) from error


COLUMNS = ("id", "image", "conversations", "data_source", "model")


def _as_rows(dataset) -> Iterable[dict]:
    """The rows of a `datasets.Dataset`, its pictures as bytes rather than decoded."""
    from datasets import Image

    if isinstance((dataset.features or {}).get("image"), Image):
        dataset = dataset.cast_column("image", Image(decode=False))
    return dataset
