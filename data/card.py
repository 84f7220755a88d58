"""README.md of a data set: front matter for the Hub, and a text that is read from the manifest, never typed."""

from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from .manifest import MANIFEST, read_manifest
from .record import FEATURES, DataError

README = "README.md"
WRITTEN = "<!-- written by perceptio from manifest.json: changes here are lost -->"
TASKS = ["image-text-to-text", "visual-question-answering", "image-segmentation", "depth-estimation"]
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))
# Names as they stand in records → identifiers of the Hub.
LICENCES = {
    "apache-2.0": "apache-2.0",
    "cc-by-2.0": "cc-by-2.0",
    "cc-by-4.0": "cc-by-4.0",
    "cc-by-nc-4.0": "cc-by-nc-4.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0",
    "cc0-1.0": "cc0-1.0",
    "mit": "mit",
    "unknown": "unknown",
}
COLUMN_TEXTS = {
    "id": "unique in the data set",
    "image": "the picture as it was published, or none for text alone",
    "messages": "`role`, `content`, and for an answer `perception`: what it opens with (`seg+depth`, `seg`, `depth`, "
    "`none`)",
    "masks": "one for each `[SEG]`, in order: `turn` (index in `messages`), `offset` (-1: opens the answer), and "
    "COCO's run lengths `size` [height, width] and `counts`, on the upright picture; an empty one says that the thing "
    "is not there",
    "depth": "16-bit PNG, see below",
    "depth_codes": "the codes of the whole depth map, row by row",
    "depth_codebook": "hash of the codebook that the codes belong to",
    "source": "where the record comes from",
    "licence": "licence of the record, as its source states it",
    "split": "as in the file name",
    "extra": "a JSON object with what the source knows besides",
    "mask_preview": "the masks in colour over the grey picture, for people; not used in training",
}  # fmt: skip


def write_card(folder, name: str | None = None, overwrite: bool = False) -> Path:
    """Write README.md from the folder's manifest and return its path.

    name: what to call the data set, by default the name of the folder. A card that someone else wrote is kept unless
    `overwrite`.
    """
    folder = Path(folder)
    path, manifest = folder / README, read_manifest(folder)
    if path.is_file() and WRITTEN not in path.read_text(encoding="utf-8") and not overwrite:
        raise DataError(
            f"{path} was written by hand, expected none or one of ours: pass `overwrite=True` to replace it"
        )
    name = name or folder.resolve().name
    text = "\n\n".join([WRITTEN, *_sections(name, manifest)])
    DatasetCard(f"---\n{card_data(name, manifest).to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def card_data(name: str, manifest: dict) -> DatasetCardData:
    """The front matter: what the Hub shows beside the data, and what `load_dataset` reads."""
    from datasets import DatasetInfo

    splits = manifest["splits"]
    rows = sum(entry["rows"] for entry in splits.values())
    found = sorted({licence for _, licence, _ in _counted(splits)})
    known = [LICENCES.get(licence.lower()) for licence in found]
    info = DatasetInfo(
        features=FEATURES,
        splits={
            split: {"name": split, "num_bytes": entry["bytes"], "num_examples": entry["rows"]}
            for split, entry in splits.items()
        },
    )
    details = info._to_yaml_dict()
    details["download_size"] = details["dataset_size"] = sum(entry["bytes"] for entry in splits.values())
    one = known[0] if len(known) == 1 and known[0] else "other"
    return DatasetCardData(
        pretty_name=name,
        license=one,
        license_name="as-stated-by-each-record" if one == "other" else None,
        annotations_creators=["machine-generated"],
        task_categories=TASKS,
        size_categories=[size_category(rows)],
        tags=["perceptio", "referring-expression", "depth", "segmentation", "arxiv:2603.18795"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
        dataset_info=details,
    )


def size_category(rows: int) -> str:
    return next((name for limit, name in SIZES if rows < limit), "10M<n<100M")


def _sections(name: str, manifest: dict) -> list[str]:
    splits = manifest["splits"]
    first = next(iter(splits), "train")
    return [
        f"# {name}",
        "Questions about pictures, with the mask of what each is about and the depth of the scene, for training "
        "models that segment and estimate depth before they answer.",
        "## What it holds",
        _counts(splits),
        _table(["source", "licence", *splits], _source_rows(splits)),
        _dropped(splits),
        "## Columns",
        _table(["column", "type", "meaning"], [[f"`{c}`", _kind(FEATURES[c]), COLUMN_TEXTS[c]] for c in FEATURES]),
        "## Depth",
        "Relative inverse depth, scaled per picture: 1 is its nearest point, 0 its farthest; it is not metres. In the "
        "16-bit PNG 0 means that there is no value, and `v` from 1 to 65535 stands for `(v - 1) / 65534`. "
        + _codebook(manifest),
        "## How to load it",
        "```python\nfrom datasets import load_dataset\n\n"
        f'rows = load_dataset("{name}", split="{first}", streaming=True)\n'
        'row = next(iter(rows))\nprint(row["image"], row["messages"])\n```',
        f"`load_dataset` takes the path of this folder or the id that it has on the Hub. `{MANIFEST}` holds the "
        "SHA-256 of every file; `perceptio.data.shards.read_shards(folder, verify=True)` checks them.",
    ]  # fmt: skip


def _counts(splits: dict) -> str:
    keys = ("rows", "pictures", "masks", "depth", "depth_codes")
    head = ["split", "rows", "with a picture", "masks", "with a depth map", "with depth codes", "MB", "files"]
    rows = [
        [name, *(f"{entry[key]:,}" for key in keys), f"{entry['bytes'] / 1e6:,.1f}", str(len(entry["shards"]))]
        for name, entry in splits.items()
    ]
    return _table(head, rows)


def _source_rows(splits: dict) -> list[list[str]]:
    """One line for each source and licence, with its rows in every split."""
    pairs = sorted({(source, licence) for source, licence, _ in _counted(splits)})
    return [
        [source, licence, *(f"{entry['sources'].get(source, {}).get(licence, 0):,}" for entry in splits.values())]
        for source, licence in pairs
    ]


def _counted(splits: dict):
    for entry in splits.values():
        for source, licences in entry["sources"].items():
            for licence, count in licences.items():
                yield source, licence, count


def _dropped(splits: dict) -> str:
    lines = []
    for name, entry in splits.items():
        tally = entry["tally"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally["dropped"].items()) or "none dropped"
        read = f"{tally['read']:,} {tally.get('unit', 'rows')} read"
        lines.append(f"- {name}: {tally['kept']:,} kept of {read} ({reasons})")
    return "\n".join(lines)


def _codebook(manifest: dict) -> str:
    if manifest["codebook"] is None:
        return "There are no depth codes."
    return f"The depth codes belong to the codebook `{manifest['codebook']}`."


def _kind(feature) -> str:
    if hasattr(feature, "feature"):
        inner = feature.feature
        return f"list of {{{', '.join(inner)}}}" if isinstance(inner, dict) else f"list of {_kind(inner)}"
    return getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else type(feature).__name__.lower()


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
