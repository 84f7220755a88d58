"""Records → the batch of a training step: tokens, tiles, and what is to be learned of masks and depth.

Sequences are padded on the right.  Masks and spans are flat over the batch, each with its row and column; nothing is
repeated, cut or invented to make shapes agree.
"""

import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration_perceptio import PerceptioConfig
from ..data.depths import decode_depth
from ..data.label import encode_codes
from ..data.masks import check_rle, decode_mask
from ..data.record import DataError
from ..data.sequence import IGNORED, TrainingSequence, build_sequence
from ..losses_perceptio import COUNTS, answer_words
from ..modeling_depth_vqvae import DepthVQVAE
from ..processing_perceptio import load_picture
from ..vqvae.maps import shrink
from .features import FeatureCache

REFUSALS = (ValueError, OSError)  # what a record or its files can be refused with
SEED_STEP = 1_000_003


class PerceptioCollator:
    """A list of records (rows of the data schema) → dict of tensors for `PerceptioForConditionalGeneration`.

    depth_model: the model's depth tokenizer, on the CPU; makes codes where a record has depth alone, and depth where
        it has codes alone.
    max_length: a longer sequence is refused, never cut.  max_tiles: of one picture; the processor's own by default.
    on_error: "stop" raises where a record cannot be used; "skip" leaves it out and says so in `skipped`.
    features: SAM2's features of pictures, in place of the pictures.
    answer_first: perception behind the answer, for comparisons.
    pad_to_multiple_of: of the length of a batch's sequences, for compiled layers, which want few lengths.

    Besides what the model takes, a batch has `sample_ids` and `skipped`, which the trainer takes out.
    """

    def __init__(
        self,
        processor,
        config: PerceptioConfig,
        depth_model: DepthVQVAE | None = None,
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
        mask_points: int = 12544,
        on_error: str = "stop",
        features: FeatureCache | None = None,
        answer_first: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        if on_error not in ("stop", "skip"):
            raise ValueError(f'`on_error` is {on_error!r}, expected "stop" or "skip"')
        self.processor, self.config, self.depth_model = processor, config, depth_model
        self.max_length, self.mask_points, self.on_error, self.features = max_length, mask_points, on_error, features
        self.answer_first, self.pad_to_multiple_of = answer_first, pad_to_multiple_of or 1
        self.images_kwargs = {} if max_tiles is None else {"max_patches": max_tiles}

    def __call__(self, records: list[dict]) -> dict:
        samples, skipped = [], []
        for record in records:
            try:
                samples.append(self.prepare(record))
            except REFUSALS as error:
                if self.on_error == "stop":
                    raise DataError(
                        f"record {record.get('id')!r} cannot be used: {' '.join(str(error).split())}; mend it "
                        '(`perceptio data check` finds all such), or pass on_error: "skip"'
                    ) from error
                skipped.append({"id": str(record.get("id")), "reason": " ".join(str(error).split())[:500]})
        batch = self.join(samples)
        return {**batch, "sample_ids": [sample["id"] for sample in samples], "skipped": skipped}

    # One record

    def prepare(self, record: dict) -> dict:
        picture = None if record["image"] is None else load_picture(record["image"]["bytes"])
        codes = self._codes(record)
        shown = record if picture is None else {**record, "image": {"bytes": picture}}
        sequence = build_sequence(shown, self.processor, codes, self.answer_first, images_kwargs=self.images_kwargs)
        self._check_length(record, sequence)
        sample = {"id": str(record["id"]), "sequence": sequence, "masks": [], "depth": None, "sam": None}
        if record["masks"]:
            if picture is None:
                raise DataError("it has masks and no picture: add the picture, or take the masks out")
            sample["masks"] = [self._mask(mask, picture) for mask in record["masks"]]
            sample["seeds"] = [_seed(record["id"], index) for index in range(len(record["masks"]))]
            sample["sam"] = self._sam(record, picture)
        if sequence.depth_spans:
            sample["depth"] = self._depth(record, codes)
        return sample

    def _codes(self, record: dict) -> list[int] | None:
        if not any("depth" in (message["perception"] or "") for message in record["messages"]):
            return None
        expected, found = self.config.depth_config.codebook_hash, record.get("depth_codebook")
        if record.get("depth_codes") is not None:
            codes, known = list(record["depth_codes"]), self.config.depth_config.num_codes
            if expected is not None and found not in (None, expected):
                raise DataError(
                    f"its depth codes belong to the codebook {found}, expected the model's, {expected}: label the "
                    "data again with this model's depth tokenizer"
                )
            if codes and not 0 <= min(codes) <= max(codes) < known:
                raise DataError(
                    f"its depth codes range from {min(codes)} to {max(codes)}, expected 0 to {known - 1}: label the "
                    "data again with this model's depth tokenizer"
                )
            return codes
        if record.get("depth") is None:
            raise DataError("it asks for a depth span and has neither depth nor codes: run `perceptio label` on it")
        return encode_codes(decode_depth(record["depth"]["bytes"] or b""), self._coder())

    def _coder(self) -> DepthVQVAE:
        if self.depth_model is None:
            raise DataError("it needs the depth tokenizer, and the collator was built without `depth_model`")
        return self.depth_model

    def _depth(self, record: dict, codes: list[int]) -> Tensor:
        """What the decoded span is compared with, float32[H, W]: the depth itself with its holes (NaN), or else its
        best decoding."""
        if record.get("depth") is not None:
            depth, side = decode_depth(record["depth"]["bytes"] or b""), self.config.depth_config.image_size
            holes = torch.from_numpy(np.isnan(depth)).float()[None, None]
            share = F.interpolate(holes, size=(side, side), mode="area")[0, 0]
            return shrink(depth, side).masked_fill(share > 0.5, float("nan"))
        with torch.no_grad():
            return self._coder().decode_ids(torch.tensor([codes]))[0]

    def _check_length(self, record: dict, sequence: TrainingSequence) -> None:
        found = len(sequence.input_ids)
        if self.max_length is not None and found > self.max_length:
            raise DataError(
                f"it is {found} tokens long, but `max_length` is {self.max_length}, and cutting would lose picture "
                f"tokens, the span or the answer: raise `max_length` to {found}, or lower `max_tiles`"
            )

    def _mask(self, mask: dict, picture) -> tuple[Tensor, bool]:
        """bool[h, w] at the resolution of mask logits, and whether the mask shows anything.

        A pixel is in where at least half of its area is; a thing too small for that keeps every pixel it touches.
        """
        side = self.config.mask_image_size // 4
        check_rle(mask["size"], mask["counts"], (picture.height, picture.width))
        full = torch.from_numpy(np.ascontiguousarray(decode_mask(mask))).float()
        share = F.interpolate(full[None, None], size=(side, side), mode="area")[0, 0]
        small = share >= 0.5
        return (small if small.any() else share > 0), bool(full.any())

    def _sam(self, record: dict, picture) -> dict:
        key = None if self.features is None else self.features.key(record["image"]["bytes"])
        stored = None if key is None else self.features.read(key)
        if stored is not None:
            return {"features": stored}
        return {"pixels": torch.from_numpy(self.processor.sam_pixels(picture))}

    # A batch

    def join(self, samples: list[dict]) -> dict:
        sequences = [sample["sequence"] for sample in samples] or [self._nothing()]
        pad = self.processor.tokenizer.pad_token_id
        longest = max(len(sequence.input_ids) for sequence in sequences)
        longest += -longest % self.pad_to_multiple_of
        ids, labels = [torch.full((len(sequences), longest), fill) for fill in (pad, IGNORED)]
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            length = len(sequence.input_ids)
            ids[row, :length] = torch.tensor(sequence.input_ids)
            labels[row, :length] = torch.tensor(sequence.labels)
            mask[row, :length] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if tiles := [s.inputs["pixel_values"] for s in sequences if "pixel_values" in s.inputs]:
            batch["pixel_values"] = torch.cat(tiles)
        return {**batch, "targets": self._targets(samples, sequences, labels)}

    def _nothing(self) -> TrainingSequence:
        """Stands for a batch of which no record could be used."""
        return TrainingSequence("", [self.processor.tokenizer.eos_token_id] * 2, [IGNORED] * 2, [], [])

    def _targets(self, samples: list[dict], sequences: list[TrainingSequence], labels: Tensor) -> dict:
        side, depth_side = self.config.mask_image_size // 4, self.config.depth_config.image_size
        seen = [sample for sample in samples if sample["masks"]]
        masks = [mask for sample in samples for mask, _ in sample["masks"]]
        present = [there for sample in samples for _, there in sample["masks"]]
        places = [(row, column) for row, s in enumerate(sequences) for column in s.seg_positions]
        spans = [(row, start) for row, s in enumerate(sequences) for start, _ in s.depth_spans]
        unread = [(row, start) for row, start in spans if not sequences[row].read_spans]
        depth = [s["depth"] for s in samples if s["depth"] is not None for _ in s["sequence"].depth_spans]
        targets = {
            "seg_positions": torch.tensor(places, dtype=torch.long).view(-1, 2),
            "mask_images": torch.tensor([i for i, s in enumerate(seen) for _ in s["masks"]], dtype=torch.long),
            "mask_labels": torch.stack(masks) if masks else torch.zeros(0, side, side, dtype=torch.bool),
            "mask_present": torch.tensor(present, dtype=torch.bool),
            "mask_seeds": torch.tensor([seed for s in seen for seed in s["seeds"]], dtype=torch.long),
            "mask_points": self.mask_points,
            "depth_positions": torch.tensor(spans, dtype=torch.long).view(-1, 2),
            "noisy_positions": torch.tensor(unread, dtype=torch.long).view(-1, 2),
            "depth_labels": torch.stack(depth) if depth else torch.zeros(0, depth_side, depth_side),
        }
        answers = (labels[:, 1:] != IGNORED).any(-1).sum().item()
        counted = {
            "tokens": (labels[:, 1:] != IGNORED).sum().item(),
            "words": answer_words(labels[:, 1:], self.config).sum().item(),
            "masks": sum(present),
            "objects": len(present),
            "spans": len(spans),
            "answers": answers,
        }
        targets["counts"] = torch.tensor([counted[name] for name in COUNTS], dtype=torch.float32)
        return targets | self._pictures(seen)

    def _pictures(self, seen: list[dict]) -> dict:
        """SAM2's pictures, or its features when all of them are there."""
        if not seen:
            return {}
        if all("features" in sample["sam"] for sample in seen):
            return {
                "sam_features": [torch.stack(maps) for maps in zip(*(s["sam"]["features"] for s in seen), strict=True)]
            }
        if any("features" in sample["sam"] for sample in seen):
            absent = next(sample["id"] for sample in seen if "pixels" in sample["sam"])
            raise DataError(f"the cache lacks the features of {absent!r}: fill it before training")
        return {"sam_pixel_values": torch.stack([sample["sam"]["pixels"] for sample in seen])}


def _seed(name, index: int) -> int:
    return zlib.crc32(str(name).encode()) * SEED_STEP + 2 * index
