"""Closest-point questions with another picture's map: the answer follows the map, and the map is not learned."""

import json
import re
from itertools import pairwise

import pytest
import torch

from perceptio.data.depths import decode_depth
from perceptio.data.label import encode_codes, load_vqvae
from perceptio.data.masks import decode_mask
from perceptio.data.recipe import parse_recipe
from perceptio.data.record import GIVEN, upright_size
from perceptio.data.sequence import IGNORED, build_sequence
from perceptio.data.shards import read_shards, write_shards
from perceptio.data.sources.counterfactual import (
    CLEAR,
    candidates,
    choose_map,
    first_answers,
    give_span,
    main,
    marked_points,
    read_counterfactual,
)
from perceptio.data.tally import Tally
from perceptio.hub.tiny_text import tiny_processor
from perceptio.world.marks import FARTHEST, NEAR, ORDER, QUESTION
from perceptio.world.records import WorldOptions, scene_records


@pytest.fixture(scope="module")
def vqvae(request):
    return load_vqvae(request.config.rootpath / "checkpoints" / "depth-tiny")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points") / "shards"
    options = WorldOptions(points=1.0, point_turns=5)  # before each such record comes another of the same scene
    write_shards([record for index in range(14) for record in scene_records(index, options=options)], folder)
    return folder


@pytest.fixture(scope="module")
def found(shards, request):
    tally = Tally()
    folder = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    records = list(read_counterfactual(shards, tally=tally, tokenizer=folder))
    assert tally.kept == len(records) >= 4
    return records


@pytest.fixture(scope="module")
def twice(shards, request):
    folder = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    return list(read_counterfactual(shards, tally=Tally(), tokenizer=folder, each=2))


def test_the_answers_are_those_of_the_given_map(found, twice, vqvae):
    for record in [*found, *twice]:
        depth = vqvae.decode_ids(torch.tensor([record["depth_codes"]]))[0]
        width, height = upright_size(record["image"]["bytes"])
        near = {
            letter: depth[int(y * len(depth) / height), int(x * len(depth) / width)].item()
            for letter, (x, y) in marked_points(record).items()
        }
        ranked = sorted(near, key=near.get, reverse=True)
        steps = [near[one] - near[next] for one, next in pairwise(ranked)]
        for question, answer in zip(record["messages"][::2], record["messages"][1::2], strict=True):
            text, content = question["content"], answer["content"]
            named = sorted(re.findall(r"point ([A-E])", text), key=near.get, reverse=True)
            if text == QUESTION:
                assert content == f"({ranked[0]})" and steps[0] >= CLEAR
            elif text == ORDER:
                assert content == ", ".join(f"({letter})" for letter in ranked) + "." and min(steps) >= CLEAR / 2
            elif text == FARTHEST:
                assert content == f"({ranked[-1]})" and steps[-1] >= CLEAR
            elif len(named) == 1:
                assert content == f"{min(9, int(10 * near[named[0]]))}."
            else:
                assert content == f"({named[0]})" and near[named[0]] - near[named[1]] >= CLEAR


def test_most_are_asked_what_names_no_point_and_what_names_one(found):
    """One answer that names none is not enough to learn from."""
    kinds = [[question["kind"] for question in json.loads(record["extra"])["questions"]] for record in found]
    for kind in ("farthest", "order", "near", "pair"):
        assert sum(kind in asked for asked in kinds) >= len(kinds) / 3, kind
    assert all(asked[0] == "points" and "points" not in asked[1:] for asked in kinds)


def test_the_first_question_keeps_its_mask_and_later_ones_have_none(found, shards):
    own = {record["id"]: record for record in read_shards(shards)}
    shorter = 0
    for record in found:
        given = own[record["id"].removesuffix("-given")]
        asked = [message["content"] for message in given["messages"][::2]]
        kept = [message["content"] for message in record["messages"][::2]]
        assert kept[0] == asked[0] and set(kept) <= {*asked, FARTHEST, ORDER}
        assert record["masks"] == given["masks"] and [mask["turn"] for mask in record["masks"]] == [1]
        modes = [message["perception"] for message in record["messages"][1::2]]
        assert modes == ["seg+depth"] + ["none"] * (len(modes) - 1)
        assert len(json.loads(record["extra"])["questions"]) == len(kept)
        shorter += len(set(kept) & set(asked)) < len(asked)
    assert shorter


def test_the_map_is_another_pictures(found, shards, vqvae):
    own = {row["id"]: encode_codes(decode_depth(row["depth"]["bytes"]), vqvae) for row in read_shards(shards)}
    order = list(own)
    for record in found:
        scene = record["id"].removesuffix("-points-given")
        of = [name for name, codes in own.items() if codes == record["depth_codes"]]
        assert of and not any(name.startswith(scene) for name in of)
        assert max(map(order.index, of)) < order.index(f"{scene}-points")


def test_with_the_second_map_each_point_is_asked_for_before_any_answer_tells_of_it(twice):
    """The mask is that of the point which is asked for first; which comes first is not always the same letter."""
    second = [record for record in twice if record["id"].endswith("-2")]
    for record in second:
        places, (width, height) = marked_points(record), upright_size(record["image"]["bytes"])
        texts = [message["content"] for message in record["messages"][::2]]
        singly = texts[: len(places)]
        assert sorted(singly) == [NEAR.format(letter) for letter in sorted(places)] and texts[len(places)] == QUESTION
        assert not set(singly) & set(texts[len(places) :])
        [mask] = record["masks"]
        (asked,) = re.findall("point ([A-E])", texts[0])
        x, y = places[asked]
        rows, columns = decode_mask(mask).nonzero()
        assert mask["size"] == [height, width] and mask["turn"] == 1
        assert abs(rows.mean() - y) < 1 and abs(columns.mean() - x) < 1 and 0 < len(rows) < 60
    assert len({record["messages"][0]["content"] for record in second}) >= 2
    assert all(record["messages"][0]["content"] == QUESTION for record in twice if record not in second)


def test_it_is_often_not_the_pictures_own_answer(found, shards):
    own = {record["id"]: record["messages"][1]["content"] for record in read_shards(shards)}
    other = [record["messages"][1]["content"] != own[record["id"].removesuffix("-given")] for record in found]
    assert sum(other) >= len(other) / 4


@pytest.fixture(scope="module")
def things(tmp_path_factory, request):
    """What is made of 24 scenes with questions which thing is closer, two maps each; and the scenes by id."""
    folder = tmp_path_factory.mktemp("things") / "shards"
    kinds = {"closer": 3, "nearest": 1, "side": 1}
    options = WorldOptions(112, 112, turns=4, points=0, kinds=kinds, repeated=("closer", "side"))
    write_shards([record for index in range(24) for record in scene_records(index, 5, options=options)], folder)
    tokenizer = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    found = list(read_counterfactual(folder, tally=Tally(), tokenizer=tokenizer, each=2, about="things"))
    assert len(found) >= 24
    return found, {record["id"]: record for record in read_shards(folder)}


def test_which_thing_is_closer_follows_from_the_given_map_too(things, vqvae):
    """At a place on each thing, which is in the mask that the first answer has; nothing else is asked."""
    found, own = things
    firsts, changed = set(), 0
    for record in found:
        questions, size = json.loads(record["extra"])["questions"], upright_size(record["image"]["bytes"])
        depth = vqvae.decode_ids(torch.tensor([record["depth_codes"]]))[0]
        given = own[record["id"].partition("-given")[0]]
        asked = [message["content"] for message in given["messages"][::2]]
        turns = [asked.index(message["content"]) for message in record["messages"][::2]]
        assert {question["kind"] for question in questions} <= {"closer", "nearest"}
        for question, turn, answer in zip(questions, turns, record["messages"][1::2], strict=True):
            rows = [int(y * len(depth) / size[1]) for _, y in question["places"]]
            columns = [int(x * len(depth) / size[0]) for x, _ in question["places"]]
            near = depth[rows, columns].tolist()
            nearest, second = sorted(near, reverse=True)[:2]
            named = question["names"][near.index(nearest)]
            assert answer["content"] == f"{named[0].upper()}{named[1:]}." and nearest - second >= CLEAR
            changed += answer["content"] != given["messages"][2 * turn + 1]["content"]
            mask = decode_mask(next(mask for mask in given["masks"] if mask["turn"] == 2 * turn + 1))
            assert all(mask[y, x] for x, y in question["places"])
            if turn == turns[0]:
                assert [decode_mask(own_mask).tolist() for own_mask in record["masks"]] == [mask.tolist()]
        firsts.add((given["id"], turns[0]))
    assert changed >= len(found) / 4
    assert len(firsts) > len({given for given, _ in firsts})  # the second time another question comes first


def test_the_lower_thing_is_not_the_nearer_one_more_often(things):
    lower = []
    for record in things[0]:
        question, answer = json.loads(record["extra"])["questions"][0], record["messages"][1]["content"]
        places = candidates(question)
        lower.append(answer == max(places, key=lambda answer: places[answer][1]))
    assert abs(sum(lower) - len(lower) / 2) <= 2 * len(lower) ** 0.5


def test_every_point_has_its_turn_to_be_the_nearest(found):
    """From the lowest on, whatever the picture shows; a map that tells nothing is not taken, nor one too few."""
    record = max(found, key=lambda record: len(marked_points(record)))
    places, (width, height) = marked_points(record), upright_size(record["image"]["bytes"])
    from_below = sorted(places, key=lambda letter: -places[letter][1])
    maps = [torch.zeros(80, 80)]
    for letter in from_below:
        x, y = places[letter]
        bump = torch.zeros(80, 80)
        bump[int(y * 80 / height), int(x * 80 / width)] = 1
        maps.append(bump)
    answers = first_answers(record, maps)
    for rank in range(2 * len(places)):
        assert choose_map(record, answers, rank) == 1 + rank % len(places)
    assert choose_map(record, answers[:2], 1) == 1 and choose_map(record, answers[:1], 0) is None


def test_each_order_of_questions_has_every_turn(shards, request, monkeypatch):
    """Dealt to the maps in a row, the lowest of two points would be the nearest with every second map alone."""
    turns: dict[str, list[int]] = {}

    def noted(record, answers, rank, time):
        turns.setdefault(record["id"], []).append(rank)
        return choose_map(record, answers, rank, time)

    monkeypatch.setattr("perceptio.data.sources.counterfactual.choose_map", noted)
    folder = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    list(read_counterfactual(shards, tally=Tally(), tokenizer=folder, each=2))
    first, second = zip(*turns.values(), strict=True)
    assert len(first) >= 8
    for ranks in (first, second):
        assert [rank - ranks[0] for rank in ranks] == list(range(len(ranks)))
    assert all(one != other for one, other in turns.values())


def test_a_picture_may_come_with_several_maps(shards, twice, request):
    folder = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    first = [record for record in twice if record["id"].endswith("-given")]
    second = {record["id"].removesuffix("-2"): record for record in twice if record["id"].endswith("-2")}
    assert len(second) >= len(first) / 2 and len({record["id"] for record in twice}) == len(twice)
    for record in first:
        if record["id"] in second:
            assert second[record["id"]]["depth_codes"] != record["depth_codes"]
    with pytest.raises(ValueError, match="`each` is 0"):
        next(read_counterfactual(shards, tally=Tally(), tokenizer=folder, each=0))
    with pytest.raises(ValueError, match="`about` is 'rings', expected one of points, things"):
        next(read_counterfactual(shards, tally=Tally(), tokenizer=folder, about="rings"))


def test_nothing_of_a_given_span_is_learned(found):
    processor = tiny_processor(grid_size=10, num_codes=128)
    record = found[0]
    given = build_sequence(record, processor)
    extra = {key: value for key, value in json.loads(record["extra"]).items() if key != GIVEN}
    plain = build_sequence({**record, "extra": json.dumps(extra)}, processor)
    assert given.input_ids == plain.input_ids and given.depth_spans == [] and len(plain.depth_spans) == 1
    opened, closed = plain.depth_spans[0]
    assert given.labels[opened : closed + 1] == [IGNORED] * 102
    assert given.labels[:opened] == plain.labels[:opened] and given.labels[closed + 1 :] == plain.labels[closed + 1 :]
    assert processor.seg_token_id in given.labels


def test_a_map_that_does_not_tell_is_left_out(found, vqvae):
    flat = torch.full((80, 80), 0.4)
    assert give_span(found[0], [0] * 100, flat, vqvae.codebook_hash()) is None


def test_labelled_scenes_are_not_encoded_again(shards, found, request, tmp_path, capsys, monkeypatch):
    from perceptio.data import label

    tokenizer = str(request.config.rootpath / "checkpoints" / "depth-tiny")
    vqvae = load_vqvae(tokenizer)
    rows = list(read_shards(shards))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    labelled = label.label_batch(columns, None, vqvae)
    labelled.pop(label.PROBLEM)
    write_shards((dict(zip(labelled, row, strict=True)) for row in zip(*labelled.values(), strict=True)),
                 tmp_path / "labelled")  # fmt: skip
    monkeypatch.setattr("perceptio.data.sources.counterfactual.encode_codes", None)
    assert main([str(tmp_path / "labelled"), str(tmp_path / "given"), "--tokenizer", tokenizer]) == 0
    assert f"wrote {len(found)} records" in capsys.readouterr().out
    again = list(read_shards(tmp_path / "given"))
    assert [(row["id"], row["depth_codes"]) for row in again] == [(row["id"], row["depth_codes"]) for row in found]
    assert main([str(tmp_path / "absent"), str(tmp_path / "other"), "--tokenizer", tokenizer]) == 2
    assert "perceptio: " in (told := capsys.readouterr().err) and "absent has no manifest.json" in told


def test_a_recipe_may_name_it():
    source = {"reader": "counterfactual", "path": "scenes", "options": {"tokenizer": "checkpoints/depth-tiny"}}
    assert parse_recipe({"sources": [source]}).sources[0].name == "counterfactual"
    with pytest.raises(ValueError, match="tokenizer"):
        parse_recipe({"sources": [{**source, "options": {}}]})
