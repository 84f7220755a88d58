"""The run: in batches, resumed, refused, with pictures that are none, and with depth codes from elsewhere."""

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_samples import Words, write_world

from perceptio.cli import main
from perceptio.data.record import DataError
from perceptio.data.shards import read_shards, write_shards
from perceptio.data.tally import Tally
from perceptio.evaluation.benchmark import Item, Prediction, open_benchmark
from perceptio.evaluation.command import model_hash
from perceptio.evaluation.predict import ForcedCodes, Predictor, Task
from perceptio.evaluation.run import Settings, _batches, _tasks, run_benchmark, table

FILES = ("run.json", "predictions.jsonl", "judgements.jsonl", "page.html")
SPLITS = ("test", "refer", "absent")


class Right:
    """The right answer of `Words`; counts what it is asked, and can be made to fail."""

    decode = None

    def __init__(self, fail_at: int | None = None):
        self.asked, self.fail_at = [], fail_at

    def __call__(self, tasks):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [task.item.id for task in tasks]
        return [Prediction(task.item.id, task.perception, task.item.truth["answer"]) for task in tasks]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_world(folder, 3, SPLITS)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    from transformers import pipeline

    return pipeline("perceptio", model=str(tiny_folder()), trust_remote_code=True)


def lines(out: Path, name: str = "predictions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]


def words(out, predictor=None, count: int = 7, facts=None, **settings) -> dict:
    return run_benchmark(
        Words(count),
        predictor or Right(),
        out.parent,
        out,
        Settings("test", **{"batch_size": 2, **settings}),
        facts or {},
    )


def command(scenes, model, out, *more: str) -> list[str]:
    room = ["--max-new-tokens", "16", "--device", "cpu"]
    return ["eval", "world", "--model", str(model), "--data", str(scenes), "--out", str(out), *room, *more]


# Without a model


def test_items_of_one_perception_are_asked_together(tmp_path):
    tasks = _tasks(Words().items(tmp_path, "test", Tally()), Settings("test"))
    batches = [[task.item.id for task in batch] for batch in _batches(tasks, 2)]
    assert batches == [["w1", "w2"], ["w0", "w3"], ["w4", "w5"], ["w6"]]


@pytest.mark.parametrize("stop", range(7))
def test_a_run_that_was_broken_off_goes_on_and_ends_the_same(tmp_path, stop):
    words(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        words(tmp_path / "broken", Right(fail_at=stop))
    done = [line["id"] for line in lines(tmp_path / "broken")] if stop else []
    again = Right()
    words(tmp_path / "broken", again)
    assert not set(done) & set(again.asked) and len(done) + len(again.asked) == 7
    for name in FILES:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [line["id"] for line in lines(tmp_path / "broken", "seconds.jsonl")] == [
        line["id"] for line in lines(tmp_path / "broken")
    ]


def test_torn_lines_and_halves_of_batches_are_taken_back(tmp_path):
    words(tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, 37):
        path.write_bytes(whole[:cut])
        predictor = Right()
        words(tmp_path / "out", predictor)
        assert path.read_bytes() == whole
        complete = whole[:cut].count(b"\n")
        assert len(predictor.asked) == (7 - complete // 2 * 2 if complete < 7 else 0)
    path.write_bytes(whole + b'{"item": "')
    words(tmp_path / "out")
    assert path.read_bytes() == whole


def test_a_finished_run_is_judged_again_without_asking(tmp_path):
    first, predictor = words(tmp_path / "out"), Right()
    assert words(tmp_path / "out", predictor) == first and predictor.asked == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"limit": 5}, "limit"),
        ({"batch_size": 3}, "batch_size"),
        ({"perception": "none"}, "perception"),
        ({"facts": {"model": "other"}}, "model"),
    ],
)
def test_a_folder_that_was_begun_otherwise_is_refused(tmp_path, change, name):
    words(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DataError, match=f"was begun with another `{name}`"):
        words(tmp_path / "out", **change)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_run_that_failed_before_its_first_prediction_binds_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        words(tmp_path / "out", Right(fail_at=0))
    assert words(tmp_path / "out", batch_size=3)["settings"]["batch_size"] == 3


def test_data_that_was_changed_is_refused(tmp_path):
    words(tmp_path / "out")
    with pytest.raises(DataError, match="has more items than the data"):
        words(tmp_path / "out", count=4)

    class Other(Words):
        def items(self, data, split, tally):
            for item in super().items(data, split, tally):
                yield Item(item.id, item.question.replace("4", "four"), (), item.perception, item.truth)

    with pytest.raises(DataError, match="line 5 of .* is about another item"):
        run_benchmark(Other(), Right(), tmp_path, tmp_path / "out", Settings("test", batch_size=2), {})


def test_what_another_wrote_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("mine")
    with pytest.raises(DataError, match="has a predictions.jsonl that this command did not write"):
        words(tmp_path / "out")
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == "mine"


def test_two_at_a_time_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing into"):
            words(tmp_path / "out")


def test_a_batch_that_does_not_fit_into_memory_is_halved(tmp_path):
    class Hungry(Right):
        def __call__(self, tasks):
            if len(tasks) > 1:
                raise torch.OutOfMemoryError("too little")
            return super().__call__(tasks)

    words(tmp_path / "a", batch_size=4)
    words(tmp_path / "b", Hungry(), batch_size=4)
    assert (tmp_path / "a" / "predictions.jsonl").read_bytes() == (tmp_path / "b" / "predictions.jsonl").read_bytes()


def test_an_error_names_the_items_that_were_asked(tmp_path):
    def refuse(tasks):
        raise ValueError("no room")

    refuse.decode = None
    with pytest.raises(ValueError, match=r"no room \(while asking 'w1', 'w2'\)"):
        words(tmp_path / "out", refuse)


def test_two_items_of_one_id_are_refused(tmp_path):
    items = [Item("a", "?"), Item("a", "!")]
    with pytest.raises(DataError, match="two items are called 'a'"):
        list(_batches(_tasks(items, Settings("test")), 2))


def test_results_say_what_was_measured_on_what(tmp_path):
    results = words(tmp_path / "out", facts={"model": "abc"})
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["model"] == "abc" and results["versions"]["torch"] == torch.__version__
    judged = lines(tmp_path / "out", "judgements.jsonl")
    found = lines(tmp_path / "out")
    assert [found[row["line"] - 1]["id"] for row in judged] == [row["id"] for row in judged] and len(judged) == 7
    assert table(results).splitlines()[1].split() == ["accuracy", "100.0%", "64.6", "–", "100.0", "7", "0"]


def test_an_item_without_a_prediction_is_wrong_and_its_reason_is_counted(tmp_path):
    class Broken(Right):
        def __call__(self, tasks):
            found = super().__call__(tasks)
            for prediction in found:
                if prediction.id == "w3":
                    prediction.answer, prediction.error = "", "damaged picture: cut off"
            return found

    results = words(tmp_path / "out", Broken())
    assert results["invalid"] == {"damaged picture": 1}
    figure = results["figures"][0]
    assert (figure["n"], figure["invalid"]) == (7, 1) and figure["value"] == pytest.approx(600 / 7)


def test_items_of_one_group_widen_the_interval(tmp_path):
    class Grouped(Words):
        def items(self, data, split, tally):
            for index, item in enumerate(super().items(data, split, tally)):
                yield replace(item, group=str(index // 4))

    class Half(Right):
        def __call__(self, tasks):
            found = super().__call__(tasks)
            return [replace(p, answer=p.answer if int(p.id[1:]) < 4 else "no") for p in found]

    narrow = words(tmp_path / "a", Half(), count=8)["figures"][0]
    wide = run_benchmark(Grouped(8), Half(), tmp_path, tmp_path / "b", Settings("test", batch_size=2), {})["figures"][
        0
    ]
    assert narrow["value"] == wide["value"] == 50 and wide["high"] - wide["low"] > narrow["high"] - narrow["low"]
    assert {row["group"] for row in lines(tmp_path / "b", "judgements.jsonl")} == {"0", "1"}


def test_a_limit_takes_the_first(tmp_path):
    assert words(tmp_path / "out", limit=3)["items"] == 3


def test_a_picture_of_another_item_is_never_its_own():
    def asked(*pictures):
        items = [Item(str(index), "?", (picture,), "depth") for index, picture in enumerate(pictures)]
        return [(task.item.pictures[0], task.other) for task in _tasks(items, Settings("test", depth_codes="other"))]

    assert asked(b"a", b"a", b"b", b"c") == [(b"a", b"b"), (b"a", b"b"), (b"b", b"a"), (b"c", b"b")]
    with pytest.raises(ValueError, match="all items show one picture"):
        asked(b"a", b"a")
    with pytest.raises(ValueError, match="pass --perception seg"):
        list(_tasks([Item("a", "?", (b"a",), "seg")], Settings("test", depth_codes="random")))


# With the tiny model


@pytest.fixture(scope="module")
def whole(scenes, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "whole"
    assert main(command(scenes, tiny_folder(), out, "--batch-size", "2")) == 0
    return out


def test_the_command_measures_every_split(whole):
    results = json.loads((whole / "results.json").read_text())
    names = {figure["name"].partition(":")[0] for figure in results["figures"]}
    assert names == set(SPLITS) and all(figure["n"] for figure in results["figures"])
    found = lines(whole)
    assert len(found) == results["items"] and all(len(line["depth_codes"]) == 9 for line in found)
    assert all(line["masks"] and line["problems"] == [] and line["error"] is None for line in found)
    page = (whole / "page.html").read_text()
    assert page.count("<figure>") >= 2 * 8 and "The best" in page and "whole depth spans" in page


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(whole, scenes, tiny_folder, tmp_path):
    out = tmp_path / "out"
    arguments = command(scenes, tiny_folder(), out, "--batch-size", "2")
    slow = (
        "import sys, time; from perceptio.evaluation import run; old = run._append\n"
        "run._append = lambda *a: (old(*a), time.sleep(0.3))\n"
        "from perceptio.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.DEVNULL)
    path = out / "predictions.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists() and len(lines(out)) < len(lines(whole))
    with open(path, "a") as file:
        file.write('{"item": "torn')
    assert main(arguments) == 0
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, out))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_another_model_or_setting_is_refused(whole, scenes, tiny_folder, capsys):
    for more in (["--perception", "seg"], ["--batch-size", "3"], ["--depth-codes", "random"]):
        assert main(command(scenes, tiny_folder(), whole, "--batch-size", "2", *more)) == 2
        assert f"was begun with another `{more[0][2:].replace('-', '_')}`" in capsys.readouterr().err
    assert main(command(scenes, tiny_folder("qwen3"), whole, "--batch-size", "2")) == 2
    assert "was begun with another `model`" in capsys.readouterr().err


def test_the_hash_of_a_model_is_that_of_its_files(pipe, tiny_folder, tmp_path):
    import shutil

    first = model_hash(pipe)
    copy = shutil.copytree(tiny_folder(), tmp_path / "copy")

    class Copy:
        class model:
            name_or_path = str(copy)

    assert model_hash(Copy) == first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_hash(Copy) != first


def test_batches_of_any_size_give_the_same(whole, scenes, pipe, tmp_path):
    expected = {line["id"]: line for line in lines(whole)}
    for size in (1, 5):
        settings = Settings("all", batch_size=size, max_new_tokens=16)
        predictor = Predictor(pipe, max_new_tokens=16)
        results = run_benchmark(open_benchmark("world"), predictor, scenes, tmp_path / str(size), settings, {})
        for line in lines(tmp_path / str(size)):
            other = expected[line["id"]]
            assert {**line, "masks": 0} == {**other, "masks": 0}
            for mask, same in zip(line["masks"], other["masks"], strict=True):
                assert mask["score"] == pytest.approx(same["score"], abs=1e-4) and mask["size"] == same["size"]
        values = {figure["name"]: figure["value"] for figure in results["figures"]}
        for figure in json.loads((whole / "results.json").read_text())["figures"]:
            assert values[figure["name"]] == pytest.approx(figure["value"], abs=0.1)


def test_a_bad_picture_is_invalid_and_the_others_go_on(scenes, pipe, tmp_path):
    records = list(read_shards(scenes, split="refer"))
    records[1]["image"]["bytes"] = records[1]["image"]["bytes"][:400]
    write_shards(records, tmp_path / "scenes", split="refer")
    settings = Settings("refer", batch_size=3, max_new_tokens=16)
    predictor = Predictor(pipe, max_new_tokens=16)
    results = run_benchmark(open_benchmark("world"), predictor, tmp_path / "scenes", tmp_path / "out", settings, {})
    assert results["items"] == 3 and results["invalid"] == {"damaged picture": 1}
    assert all(figure["invalid"] == 1 for figure in results["figures"])
    found = lines(tmp_path / "out")
    assert found[1]["error"].startswith("damaged picture: ") and found[1]["masks"] == []
    assert found[0]["error"] is found[2]["error"] is None and found[0]["masks"]
    judged = lines(tmp_path / "out", "judgements.jsonl")[1]
    assert judged["values"]["iou"] == judged["values"]["delta1"] == 0 and judged["invalid"] == found[1]["error"]


# Depth codes from elsewhere


def tasks_of(scenes, other: bool = False) -> list[Task]:
    items = open_benchmark("world").items(scenes, "test", Tally())
    return list(_tasks(items, Settings("test", depth_codes="other" if other else "own")))[:4]


def test_forced_codes_stand_in_the_sequence_and_the_mask_stays(scenes, pipe, tmp_path):
    """The ids that are generated, not only what is reported of them."""
    seen = []
    perceive = type(pipe.model).perceive

    def watching(self, *args, **kwargs):
        output = perceive(self, *args, **kwargs)
        seen.append(output.sequences[:, output.prompt_length :])
        return output

    tasks = tasks_of(scenes)
    own = Predictor(pipe, max_new_tokens=16)(tasks)
    first, count = pipe.model.config.depth_code_token_ids
    for name in ("random", "constant", "oracle"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipe.model), "perceive", watching)
            found = Predictor(pipe, max_new_tokens=16, depth_codes=name)(tasks)
        rows = seen[-1]
        assert [[id - first for id in row[:9]] for row in rows.tolist()] == [p.depth_codes for p in found]
        assert (rows[:, 9] == pipe.model.config.depth_end_token_id).all()
        assert all(p.problems == [] and len(p.masks) >= 1 for p in found)
        for prediction, same in zip(found, own, strict=True):
            assert prediction.masks[0] == same.masks[0], "the [SEG] stands before the span"
    assert found[0].depth_codes != own[0].depth_codes or found[1].depth_codes != own[1].depth_codes


def test_the_codes_are_what_their_names_say(scenes, pipe):
    from perceptio.data.depths import decode_depth
    from perceptio.data.label import encode_codes

    def codes(name: str, tasks) -> list[list[int]]:
        return [p.depth_codes for p in Predictor(pipe, max_new_tokens=16, depth_codes=name)(tasks)]

    tasks = tasks_of(scenes, other=True)
    assert codes("constant", tasks) == [[4] * 9] * 4
    random = codes("random", tasks)
    assert random == codes("random", tasks) and len({tuple(row) for row in random}) == 4
    assert random[:1] == codes("random", tasks[:1]), "they follow from the item alone"
    true = [encode_codes(decode_depth(task.item.depth), pipe.model.depth_model) for task in tasks]
    assert codes("oracle", tasks) == true
    swapped = [Item(t.item.id, t.item.question, (t.other,), "depth") for t in tasks]
    assert codes("other", tasks) == codes("own", [Task(item, "depth") for item in swapped])


def test_the_answer_is_written_after_the_forced_codes():
    """Past the span nothing is forced."""
    forced = ForcedCodes(torch.tensor([[5, 6], [7, 5]]))
    prompt, scores = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 9)
    for step in range(2):
        ids = torch.cat([prompt, torch.zeros(2, step, dtype=torch.long)], dim=1)
        assert forced(ids, scores).argmax(-1).tolist() == [[5, 7], [6, 5]][step]
        assert (forced(ids, scores) == -torch.inf).sum() == 16
    assert forced(torch.zeros(2, 5, dtype=torch.long), scores) is scores


def test_an_oracle_needs_a_true_depth(scenes, pipe):
    task = tasks_of(scenes)[0]
    item = Item("a", task.item.question, task.item.pictures, "depth")
    with pytest.raises(ValueError, match="'a' has no true depth"):
        Predictor(pipe, max_new_tokens=16, depth_codes="oracle")([Task(item, "depth")])


def test_the_depth_that_is_scored_is_that_of_the_codes(scenes, pipe):
    prediction = Predictor(pipe, max_new_tokens=16, depth_codes="constant")(tasks_of(scenes)[:1])[0]
    expected = pipe.model.decode_depth(torch.tensor([prediction.depth_codes]))[0]
    assert torch.equal(torch.from_numpy(prediction.depth), expected)


# The command


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "`--data` is nowhere, expected the folder of the data of world"),
        (["--split", "testA"], "world has no split 'testA', expected one of all, train"),
        (["--batch-size", "0"], "`--batch-size` is 0, expected 1 or more"),
        (["--limit", "-1"], "`--limit` is -1, expected 1 or more"),
    ],
)
def test_wrong_arguments_are_one_line(scenes, tmp_path, capsys, more, message):
    assert main(command(scenes, "no-model", tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_perception_without_what_is_measured_is_refused(scenes, tmp_path, capsys):
    arguments = ["eval", "depth", "--data", str(scenes), "--out", str(tmp_path / "out"), "--perception", "seg"]
    assert main(arguments) == 2
    assert "`--perception` is seg, but depth is about depth" in capsys.readouterr().err


def test_the_guide_names_every_benchmark_and_its_splits(request):
    """Where a row names fewer splits it says "or a subtask" or "or one"."""
    from perceptio.evaluation import BENCHMARKS
    from perceptio.evaluation.benchmark import open_benchmark

    guide = (request.config.rootpath / "docs" / "evaluation.md").read_text("utf-8")
    rows = [line.split("|")[1:3] for line in guide.splitlines() if line.startswith("| `")]
    told = {name: splits.strip() for names, splits in rows for name in re.findall(r"`([^`]+)`", names)}
    assert set(BENCHMARKS) <= set(told)
    for name in BENCHMARKS:
        splits = open_benchmark(name).splits
        parts = re.split(r", (?:or )?", told[name])
        assert parts[0] == splits[0] and (tuple(parts) == splits or parts[-1] in ("a subtask", "one")), (name, splits)
