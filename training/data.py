"""What a run trains on, as `datasets.Dataset`: places of a mixture, whose records are read when they are asked for."""

import os
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, Image, IterableDataset

from ..data.mixture import Mixture, as_told
from ..data.recipe import Recipe, Source, open_recipe, read_recipe
from ..data.record import COLUMNS, DataError, upright_size
from ..data.sequence import render

RECIPES = (".yaml", ".yml")


class RunData:
    """A recipe, a folder of shards or a person's own folder or file, opened until `close`.

    spec: path of a data recipe (YAML), of a folder, or of a .jsonl file, or the Hub id of a data set.
    split: of a folder; a recipe names its own.
    """

    def __init__(self, spec: str, split: str = "train"):
        self._stack = ExitStack()
        self.tallies: dict = {}
        self.mixture: Mixture = self._stack.enter_context(open_recipe(as_recipe(spec, split), tallies=self.tallies))

    def close(self) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.mixture.recipe.sources]

    def training(self, epochs: float = 1.0, samples: int | None = None) -> Dataset:
        """The places of all epochs one after another, in the order of the recipe's seed.

        epochs: of which the last may be a part;  samples: that many in place of whole epochs.
        """
        places, epoch = [], 0
        while (samples is None and epoch < epochs) or (samples is not None and len(places) < samples):
            length = len(self.mixture.epoch(epoch))
            part = length if samples is not None else round(length * min(1.0, epochs - epoch))
            places += [(epoch, place) for place in range(part)]
            epoch += 1
        places = places[:samples]
        if not places:
            raise DataError("there is nothing to train on: raise `num_train_epochs`, or add data")
        return _with_records(places, _Reader(self.mixture))

    def evaluation(self, samples: int | None = None) -> dict[str, Dataset]:
        """The records of each source in their order, at most `samples` of each."""
        found = {}
        for index, (name, table) in enumerate(zip(self.names, self.mixture.tables, strict=True)):
            count = len(table) if samples is None else min(samples, len(table))
            found[name] = _with_records([(index, row) for row in range(count)], _TableReader(self.mixture))
        return found


class _Reader:
    """(epoch, place) → record; an epoch's order is made once."""

    def __init__(self, mixture: Mixture):
        self.mixture, self.epochs = mixture, {}

    def __call__(self, epoch: int, place: int) -> dict:
        if epoch not in self.epochs:
            self.epochs = {epoch: self.mixture.epoch(epoch)}
        return self.epochs[epoch][place]


class _TableReader:
    """(source, row) → record."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __call__(self, source: int, row: int) -> dict:
        record, entry = self.mixture.tables[source][row], self.mixture.recipe.sources[source]
        return as_told(record, entry)


class _Columns:
    """Pairs of places → columns of their records; a class, since loading processes that are not forks are sent it."""

    def __init__(self, read: _Reader | _TableReader):
        self.read = read

    def __call__(self, batch: dict) -> dict:
        records = [self.read(*pair) for pair in zip(batch["first"], batch["second"], strict=True)]
        return {column: [record[column] for record in records] for column in COLUMNS}


def _with_records(places: list[tuple[int, int]], read: _Reader | _TableReader) -> Dataset:
    first, second = zip(*places, strict=True)
    return Dataset.from_dict({"first": list(first), "second": list(second)}).with_transform(_Columns(read))


def as_recipe(spec: str, split: str) -> Recipe:
    path = Path(os.path.abspath(spec))  # "." has no name
    if path.suffix in RECIPES:
        return read_recipe(path)
    if "://" in str(spec) or (not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(spec))):
        url = str(spec) if "://" in str(spec) else f"hf://datasets/{spec}"
        return Recipe((Source(reader="shards", path=url, name=path.name, split=split),))
    shards = (path / "manifest.json").is_file() and (path / "data").is_dir()
    source = Source(reader="shards" if shards else "own", path=path.name, name=path.name, split=split)
    return replace(Recipe((source,)), root=str(path.parent))


def as_records(dataset):
    """A data set of records as it came from `load_dataset`, its pictures left encoded."""
    if not isinstance(dataset, (Dataset, IterableDataset)) or dataset.features is None:
        return dataset
    for column, kind in dataset.features.items():
        if isinstance(kind, Image) and kind.decode:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def check_lengths(dataset: Dataset, processor, max_length: int, max_tiles: int | None, most: int = 20_000) -> None:
    """Raise where one of the first `most` records is longer than `max_length`; nothing is decoded for it."""
    lengths = record_lengths(dataset, processor, max_tiles, most)
    longest = max(lengths, default=0)
    if longest > max_length:
        name = dataset[lengths.index(longest)]["id"]
        raise DataError(
            f"record {name!r} is {longest} tokens long, but `max_length` is {max_length}, and cutting would lose "
            f"picture tokens, the span or the answer: raise `max_length` to {longest}, or lower `max_tiles`"
        )


def record_lengths(dataset: Dataset, processor, max_tiles: int | None = None, most: int | None = None) -> list[int]:
    """Tokens of each of the first `most` records.

    It is 0 for one that cannot be measured, which is left to the training: it skips it, or stops and names it.
    """
    kwargs, lengths = {} if max_tiles is None else {"max_patches": max_tiles}, []
    for index in range(len(dataset) if most is None else min(len(dataset), most)):
        record = dataset[index]
        try:
            lengths.append(sequence_length(record, processor, **kwargs))
        except (ValueError, OSError):
            lengths.append(0)
    return lengths


def sequence_length(record: dict, processor, **images_kwargs) -> int:
    """Tokens of a record, its depth span included, without decoding its picture."""
    codes = record.get("depth_codes") or [0] * processor.span_length
    ids = processor._tokenize([render(record, processor, codes)], {})["input_ids"][0]
    if record["image"] is None:
        return len(ids)
    width, height = upright_size(record["image"]["bytes"])
    tokens = processor._get_num_multimodal_tokens([(height, width)], **images_kwargs)["num_image_tokens"]
    return len(ids) - 1 + tokens[0]
