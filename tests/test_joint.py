"""The joint set: turns, captions and depth of a picture in one record, and shards that say how they were made."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from referring_samples import OTHER, annotation, jpeg, picture, ref, write_grefcoco, write_refer
from shard_samples import tiny_vqvae

from perceptio.data import joint_run
from perceptio.data.captions import CachedCaptioner, Refusal, TemplateCaptioner
from perceptio.data.depths import decode_depth
from perceptio.data.joint import build_joint, labeller_from, plan_turns
from perceptio.data.label import PROBLEM, label_batch
from perceptio.data.masks import area
from perceptio.data.record import COLUMNS
from perceptio.data.sequence import build_sequence
from perceptio.data.shards import read_shards
from perceptio.data.sources.grefcoco import grefcoco_items
from perceptio.data.sources.refer import refer_items
from perceptio.data.tally import Tally
from perceptio.data.templates import DESCRIPTION_QUESTIONS, REFERRING_QUESTIONS, fill
from perceptio.data.validate import check_records


def brightness(pictures: list[Image.Image]) -> list[np.ndarray]:
    """A teacher: bright is near."""
    return [np.asarray(picture.convert("L"), np.float32) for picture in pictures]


@pytest.fixture(scope="module")
def vqvae():
    return tiny_vqvae()


@pytest.fixture
def root(tmp_path):
    """Two pictures: one with four things and eleven expressions, one with one of each."""
    refs = [ref(n, 1, n, *(f"thing {n} as {word}" for word in ("one", "two", "three"))) for n in range(1, 4)]
    refs += [ref(4, 1, 4, "the last thing", "thing 4"), ref(5, 2, 5, "dog")]
    shifted = [[[x + n for x in OTHER[0]]] for n in range(4)]
    annotations = [annotation(n + 1, 1, shifted[n]) for n in range(4)] + [annotation(5, 2, category=2)]
    write_refer(tmp_path, refs, annotations, [picture(1), picture(2)])
    return tmp_path


def build(root, *arguments, expected=12, make=refer_items, **options):
    """The records, all good, and a tally that adds up to the `expected` number of expressions."""
    tally = Tally("joint")
    records = list(build_joint(make(root, tally=tally), *arguments, tally=tally, **options))
    tally.check(expected)
    assert sum(len(record["masks"]) for record in records) == tally.kept
    return records, tally


def problems(records, **options):
    return [problem for _, found in check_records(records, **options) for problem in found]


def test_mask_depth_and_sentence_of_one_picture_are_one_record(root, vqvae):
    records, tally = build(root, TemplateCaptioner(), labeller_from(brightness, vqvae))
    assert problems(records, num_codes=8, span_length=9, codebook=vqvae.codebook_hash()) == []
    assert [len(record["masks"]) for record in records] == [5, 1]
    assert tally.dropped == {"beyond the turns of its picture": 6}
    answers = [message for message in records[0]["messages"] if message["role"] == "assistant"]
    assert [answer["perception"] for answer in answers] == ["seg+depth", "seg", "seg", "seg", "seg"]
    refs = [turn["ref"] for turn in json.loads(records[0]["extra"])["turns"]]
    assert set(refs) == {"1", "2", "3", "4"}, "five turns leave no thing out"
    assert len({mask["counts"] for mask in records[0]["masks"]}) == 4
    for record in records:
        expected = brightness([Image.open(root / "images/mscoco/images/train2014" / record["image"]["path"])])[0]
        stored = decode_depth(record["depth"]["bytes"])
        assert stored.shape == expected.shape and np.corrcoef(stored.ravel(), expected.ravel())[0, 1] > 0.99


def test_a_record_is_the_sequence_that_the_paper_describes(root, vqvae, tiny_folder):
    """[SEG], the depth span and the sentence, in this order; further turns have their [SEG] alone."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_folder())
    records, _ = build(root, TemplateCaptioner(), labeller_from(brightness, vqvae))
    for record in records:
        sequence = build_sequence(record, processor, record["depth_codes"])
        assert len(sequence.seg_positions) == len(record["masks"]) and len(sequence.depth_spans) == 1
        start, end = sequence.depth_spans[0]
        assert sequence.seg_positions[0] == start - 1 and end - start - 1 == 9
        assert record["messages"][1]["content"] in sequence.text.split("<d_end>")[1]


def test_questions_are_filled_with_the_phrase_and_differ(root):
    records, _ = build(root, TemplateCaptioner(), more="split")
    asked = Counter()
    for record in records:
        for question, answer in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            phrase = next(p for p in PHRASES if p in question["content"])
            assert phrase in answer["content"]
            asked[
                next(q for q in REFERRING_QUESTIONS + DESCRIPTION_QUESTIONS if fill(q, phrase) == question["content"])
            ] += 1
    assert sum(asked.values()) == 12 and len(asked) >= 5


PHRASES = [f"thing {n} as {word}" for n in (1, 2, 3) for word in ("one", "two", "three")]
PHRASES += ["the last thing", "thing 4", "dog"]


def test_further_expressions_make_further_records(root):
    records, tally = build(root, more="split")
    assert [len(record["masks"]) for record in records] == [5, 5, 1, 1] and not tally.dropped
    assert [record["id"].rpartition("train/")[2] for record in records] == ["1/0", "1/1", "1/2", "2"]
    texts = " | ".join(m["content"] for record in records for m in record["messages"] if m["role"] == "user")
    assert all(phrase in texts for phrase in PHRASES) and problems(records) == []


@pytest.mark.parametrize("more", ["choose", "split"])
@pytest.mark.parametrize("expressions", [1, 2, 3, 11, 50])
def test_every_expression_is_planned_once_or_left_over(root, expressions, more):
    for item in refer_items(root, tally=Tally()):
        samples, left = plan_turns(item, expressions, more, 0)
        turns = [(turn.thing.key, turn.phrase) for sample in samples for turn in sample]
        assert len(set(turns)) == len(turns) == item.expressions() - left
        assert all(1 <= len(sample) <= expressions for sample in samples)
        assert (more == "split" and left == 0) or len(samples) == 1


def test_the_seed_alone_decides(root):
    first, again, other = (build(root, TemplateCaptioner(), seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_depth_where_it_is_asked_for(root, vqvae):
    label = labeller_from(brightness, vqvae)
    for turns, expected in (("first", 1), ("all", 5), ("none", 0)):
        records, _ = build(root, TemplateCaptioner(), label, depth_turns=turns)
        modes = [message["perception"] for message in records[0]["messages"][1::2]]
        assert modes == ["seg+depth"] * expected + ["seg"] * (5 - expected) and problems(records) == []
    plain, _ = build(root)
    assert plain[0]["depth"] is None and {m["perception"] for m in plain[0]["messages"]} == {None, "seg"}


def test_records_without_a_labeller_can_be_labelled_afterwards(root, vqvae):
    records, _ = build(root, TemplateCaptioner(), depth_turns="first")
    assert all("depth" in str(problem) for problem in problems(records)) and len(problems(records)) == 2
    done = label_batch({name: [record[name] for record in records] for name in COLUMNS}, brightness, vqvae)
    assert done.pop(PROBLEM) == [None, None]
    labelled = [{name: done[name][row] for name in COLUMNS} for row in range(2)]
    assert labelled == build(root, TemplateCaptioner(), labeller_from(brightness, vqvae))[0]


def test_what_is_not_there_is_answered_so_and_no_captioner_is_asked(tmp_path):
    refs = [ref(1, 1, [-1], "the elephant", no_target=True), ref(2, 1, [1], "cup", no_target=False)]
    write_grefcoco(tmp_path, refs, [annotation(1, 1)], [picture(1)])
    asked = []

    class Listening(TemplateCaptioner):
        def __call__(self, requests):
            asked.extend(request.phrase for request in requests)
            return super().__call__(requests)

    records, _ = build(tmp_path, Listening(), expected=2, make=grefcoco_items)
    assert asked == ["cup"] and problems(records) == []
    for mask in records[0]["masks"]:
        answer = records[0]["messages"][mask["turn"]]["content"]
        assert (area(mask) == 0) == ("elephant" in answer)
        assert area(mask) or any(word in answer for word in ("nothing", "Nothing", "cannot", "not"))


class Refusing(TemplateCaptioner):
    def __init__(self, *phrases):
        super().__init__()
        self.phrases = phrases

    def __call__(self, requests):
        sentences = super().__call__(requests)
        refused = [any(phrase in request.phrase for phrase in self.phrases) for request in requests]
        return [Refusal("caption too long", "…") if r else s for r, s in zip(refused, sentences, strict=True)]


def test_a_refused_caption_costs_its_turn_and_a_record_without_turns_is_none(root):
    records, tally = build(root, Refusing("thing 1", "dog"), expressions=50)
    assert tally.dropped == {"caption too long": 4} and [len(record["masks"]) for record in records] == [8]
    assert problems(records) == []


def test_a_labeller_that_fails_costs_its_picture(root, vqvae):
    def teacher(pictures):
        if np.asarray(pictures[0]).tobytes() == dog:
            raise RuntimeError("no map for this one")
        return brightness(pictures)

    path = root / "images/mscoco/images/train2014" / picture(2)["file_name"]
    dog = np.asarray(Image.open(path)).tobytes()
    records, tally = build(root, TemplateCaptioner(), labeller_from(teacher, vqvae))
    assert len(records) == 1 and tally.dropped["labeller failed"] == 1
    assert "no map for this one" in tally.examples["labeller failed"][0]


def test_a_picture_that_lies_turned_has_its_masks_and_depth_turned(root, vqvae):
    path = root / "images/mscoco/images/train2014" / picture(2)["file_name"]
    path.write_bytes(jpeg(orientation=6))
    records, _ = build(root, TemplateCaptioner(), labeller_from(brightness, vqvae))
    assert problems(records) == []
    assert records[1]["masks"][0]["size"] == [64, 48] == list(decode_depth(records[1]["depth"]["bytes"]).shape)


def test_captions_of_many_pictures_are_asked_for_together(root):
    calls = []

    class Listening(TemplateCaptioner):
        def __call__(self, requests):
            calls.append(len(requests))
            return super().__call__(requests)

    build(root, Listening())
    assert calls == [6]


@pytest.mark.parametrize("wrong", [{"more": "all"}, {"expressions": 0}, {"depth_turns": "last"}])
def test_wrong_options_are_named(root, wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        list(build_joint(refer_items(root, tally=Tally()), **wrong))


# Shards


def run(root, out, *more) -> int:
    return joint_run.main(["--root", str(root), "--out", str(out), "--cache", str(out.parent / "c.jsonl"), *more])


def test_the_manifest_says_how_the_set_was_made(root, tmp_path, capsys):
    assert run(root, tmp_path / "out", "--dataset", "refcoco") == 0
    assert "2 records; 6 of 12 expressions kept\n  6 beyond the turns" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    tally = manifest["splits"]["train"]["tally"]
    assert tally["read"] == tally["kept"] + sum(tally["dropped"].values()) == 12 and tally["unit"] == "expressions"
    made = tally["run"]
    for name in ("refs(unc).p", "instances.json"):
        assert made["files"][name] == hashlib.sha256((root / "refcoco" / name).read_bytes()).hexdigest()
    assert made["captioner"] == {"captioner": "template", "seed": 0} and made["joint"]["seed"] == 0
    assert {"perceptio", "python", "datasets"} <= set(made["versions"]) and str(root) not in json.dumps(manifest)
    records = list(read_shards(tmp_path / "out", verify=True))
    assert problems(records) == [] and len(records) == 2


def test_the_same_command_gives_the_same_bytes_and_asks_no_caption_twice(root, tmp_path, monkeypatch):
    assert run(root, tmp_path / "a") == 0
    lines = (tmp_path / "c.jsonl").read_bytes()
    monkeypatch.setattr(TemplateCaptioner, "__call__", lambda *_: pytest.fail("a caption was asked for again"))
    assert run(root, tmp_path / "b") == 0
    assert (tmp_path / "c.jsonl").read_bytes() == lines
    for path in (tmp_path / "a").rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes()


def test_depth_from_folders_of_models(root, tmp_path, tiny_folder, vqvae):
    """The command with a depth teacher of transformers and the tokenizer of a Perceptio."""
    from transformers import DPTImageProcessorPil, GLPNConfig, GLPNForDepthEstimation

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    GLPNForDepthEstimation(GLPNConfig(**sizes, decoder_hidden_size=8)).save_pretrained(tmp_path / "teacher")
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    models = ["--teacher", str(tmp_path / "teacher"), "--vqvae", str(tiny_folder())]
    assert run(root, tmp_path / "out", *models) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["splits"]["train"]["perception"] == {"seg": 4, "seg+depth": 2}
    assert manifest["codebook"] and manifest["splits"]["train"]["tally"]["run"]["teacher"] == "teacher"
    assert problems(read_shards(tmp_path / "out"), num_codes=8, span_length=9, codebook=manifest["codebook"]) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reader", "coco"], "`reader` is 'coco', expected one of refer"),
        (
            ["--split-by", "google"],
            "refs(google).p, field `file`: missing; the folder has files instances.json, refs(unc).p",
        ),
        (["--split", "dev"], "no entry of 'dev'; expected train"),
        (["--only", "targets"], "refer has no option 'only', expected one of dataset, images_dir"),
        (["--teacher", "x"], "depth needs --vqvae and --teacher"),
        (["--captioner", "no/such/model"], "'no/such/model' is no folder"),
    ],
)
def test_what_the_command_cannot_do_is_named(tmp_path, root, capsys, arguments, message):
    assert run(root, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_cached_captioner_goes_into_a_joint_set(root, tmp_path):
    with CachedCaptioner(TemplateCaptioner(), tmp_path / "c.jsonl") as captioner:
        assert build(root, captioner)[0] == build(root, TemplateCaptioner())[0]
