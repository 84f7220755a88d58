"""A person's own data: what is good is read as meant, and every broken row is found, named and counted in one pass."""

import json
import sys
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from own_samples import FAULTS, FILES, HEIGHT, WIDTH, box_mask, good_row, jpeg, npy, png, ramp, write_rows
from PIL import Image, ImageOps

from perceptio.cli import main
from perceptio.data.check import check_data
from perceptio.data.depths import decode_depth
from perceptio.data.load import open_data
from perceptio.data.masks import area, decode_mask
from perceptio.data.record import DataError, upright_size
from perceptio.data.shards import write_shards
from perceptio.data.tally import Tally


def test_a_good_folder_is_read_as_meant(tmp_path):
    write_rows(tmp_path, [good_row(index, tmp_path) for index in range(6)])
    records = list(open_data(tmp_path))
    modes = [record["messages"][1]["perception"] for record in records]
    assert modes == ["seg", "seg+depth", "seg", "depth", "seg", "none"]
    assert np.array_equal(decode_mask(records[0]["masks"][0]), box_mask() > 0)
    assert np.array_equal(decode_mask(records[1]["masks"][0]), box_mask() > 0)
    assert area(records[2]["masks"][0]) == 0 and area(records[4]["masks"][0]) == 7
    depth = decode_depth(records[3]["depth"]["bytes"])
    assert depth.shape == (HEIGHT, WIDTH) and depth[-1, -1] == 1 and depth[0, 0] == 0
    assert [record["id"] for record in records] == [f"r{index}" for index in range(6)]
    assert records[0]["split"] == "train" and records[0]["source"] == "own"


def test_several_turns_with_their_masks(tmp_path):
    row = {
        "image": "0.jpg",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the cup?"}]},
            {"role": "assistant", "content": "There, and a pot."},
            {"role": "user", "content": "And the dog?"},
            {"role": "assistant", "content": "None."},
        ],
        "masks": [
            {"turn": 3, "absent": True},
            {"turn": 1, "mask": "mask.png", "offset": 16},
            {"turn": 1, "mask": "mask.png"},
        ],
        "depth": "depth.png",
    }
    good_row(0, tmp_path)
    (record,) = open_data(write_rows(tmp_path, [row]))
    assert [(mask["turn"], mask["offset"]) for mask in record["masks"]] == [(1, -1), (1, 16), (3, -1)]
    assert [message["perception"] for message in record["messages"]] == [None, "seg+depth", None, "seg"]
    assert record["messages"][0]["content"] == "Where is the cup?"


def test_the_hubs_folder_form_in_splits(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "a b é.jpg").write_bytes(jpeg())
        (folder / "m.png").write_bytes(FILES["mask.png"])
        row = {"file_name": "a b é.jpg", "mask_file_name": "m.png", "question": f"Where ({split})?", "answer": "Here."}
        write_rows(folder, [row], "metadata.jsonl")
    (record,) = open_data(tmp_path, split="test")
    assert record["split"] == "test" and record["messages"][0]["content"] == "Where (test)?" and record["masks"]
    assert {record["split"] for record in open_data(tmp_path)} == {"train", "test"}
    with pytest.raises(DataError, match="one of test, train"):
        list(open_data(tmp_path, split="validation"))


def test_csv_metadata(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "metadata.csv").write_text(
        'file_name,question,answer\na.jpg,"Where, then?",Here.\n', encoding="utf-8-sig"
    )
    (record,) = open_data(tmp_path)
    assert record["messages"][0]["content"] == "Where, then?"


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_on_a_turned_picture_fall_on_the_same_thing(orientation, tmp_path):
    """Drawn before or after EXIF turns the picture: either is right when it is said, and a guess is refused."""
    (tmp_path / "a.jpg").write_bytes(jpeg(orientation=orientation))
    stored = Image.fromarray(box_mask())
    exif = stored.getexif()
    exif[0x0112] = orientation
    file = BytesIO()
    stored.save(file, "PNG", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(file))
    (tmp_path / "stored.png").write_bytes(png(box_mask()))
    shown.save(tmp_path / "shown.png")
    base = {"image": "a.jpg", "question": "Where?", "answer": "Here."}
    rows = [{**base, "mask": f"{name}.png", "mask_orientation": name} for name in ("stored", "shown")]
    first, second = open_data(write_rows(tmp_path, rows))
    expected = np.asarray(shown) > 0
    assert np.array_equal(decode_mask(first["masks"][0]), expected)
    assert np.array_equal(decode_mask(second["masks"][0]), expected)
    assert upright_size(first["image"]["bytes"]) == shown.size
    write_rows(tmp_path, [{**base, "mask": "stored.png"}])
    assert "mask_orientation" in check_data(tmp_path).problems[0].remedy + check_data(tmp_path).problems[0].expected


def test_a_data_set_by_columns(tmp_path):
    masks = [png(box_mask()), png(box_mask())]
    table = Dataset.from_dict(
        {
            "photo": [jpeg(), jpeg(seed=1)],
            "prompt": ["Where is it?", "And this?"],
            "reply": ["Here.", "There."],
            "region": masks,
            "other": [1, 2],
        }
    ).cast_column("photo", ImageFeature())
    table = table.cast_column("region", ImageFeature())
    columns = {"image": "photo", "question": "prompt", "answer": "reply", "mask": "region"}
    for data in (table, table.to_iterable_dataset()):
        records = list(open_data(data, columns=columns))
        assert [record["messages"][0]["content"] for record in records] == ["Where is it?", "And this?"]
        assert np.array_equal(decode_mask(records[1]["masks"][0]), box_mask() > 0)
    with pytest.raises(DataError, match="did you mean 'reply'"):
        list(open_data(table, columns={**columns, "answer": "repl"}))
    with pytest.raises(DataError, match="question and answer, or messages"):
        list(open_data(table))
    with pytest.raises(DataError, match="unknown name"):
        list(open_data(table, columns={"picture": "photo"}))


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_chat_data_sets_need_no_map(form, tmp_path):
    """As TRL and LLaVA have them: a list of pictures, or one, beside the turns."""
    keys = ("role", "content", "user", "assistant") if form == "messages" else ("from", "value", "human", "gpt")
    turns = [{keys[0]: keys[2], keys[1]: "<image>\nWhere?"}, {keys[0]: keys[3], keys[1]: "Here."}]
    turns[0][keys[1]] = turns[0][keys[1]].removeprefix("<image>\n") if form == "messages" else turns[0][keys[1]]
    table = Dataset.from_dict({"images": [[jpeg()], [jpeg(), jpeg()], []], form: [turns] * 3, "other": [1, 2, 3]})
    table = table.cast_column("images", List(ImageFeature()))
    tally = Tally("chat")
    records = list(open_data(table, on_problem="skip", tally=tally))
    assert dict(tally.dropped) == {"image": 1} and "2 pictures" in tally.examples["image"][0]
    assert [record["image"] is None for record in records] == [False, True]
    assert records[0]["image"]["bytes"] == jpeg()
    for record in records:
        assert [(message["role"], message["content"]) for message in record["messages"]] == [
            ("user", "Where?"),
            ("assistant", "Here."),
        ]


def test_our_own_shards_and_a_data_set_of_records_come_back_as_they_are(tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    records = list(open_data(write_rows(source, [good_row(index, source) for index in range(4)])))
    write_shards(records, tmp_path / "shards")
    again = list(open_data(tmp_path / "shards"))
    assert [{**record, "mask_preview": None} for record in again] == records
    from perceptio.data.record import FEATURES

    assert list(open_data(Dataset.from_list(records, features=FEATURES))) == records


def test_nothing_is_fetched_unasked(tmp_path):
    with pytest.raises(DataError, match="allow_download"):
        list(open_data("someone/something"))
    with pytest.raises(DataError, match="a folder, a .jsonl file or a Hub id"):
        list(open_data(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no rows"):
        list(open_data(tmp_path))


def test_skipping_counts_and_stopping_stops(tmp_path):
    rows = [good_row(index, tmp_path) for index in range(5)]
    rows[2]["image"], rows[4]["question"] = "nowhere.jpg", 3
    write_rows(tmp_path, rows)
    tally = Tally("own")
    assert len(list(open_data(tmp_path, on_problem="skip", tally=tally))) == 3
    tally.check(5)
    assert dict(tally.dropped) == {"image": 1, "question": 1}
    with pytest.raises(DataError, match=r"train.jsonl, row 3, field `image`: 'nowhere.jpg'"):
        list(open_data(tmp_path))


def test_sixty_broken_rows_of_sixty_are_found_in_one_pass_and_no_good_one_is(tmp_path):
    """Good and broken rows in turn; each broken one is named by row and field, and nothing else is."""
    assert len(FAULTS) >= 60
    rows, expected = [], {}
    for index, (name, (broken, field)) in enumerate(FAULTS.items()):
        rows.append(good_row(2 * index, tmp_path))
        rows.append(broken(tmp_path, good_row(2 * index + 1, tmp_path)))
        expected[len(rows)] = (name, field)
    report = check_data(write_rows(tmp_path, rows), workers=2)
    found: dict[int, set] = {}
    for problem in report.problems:
        found.setdefault(problem.row, set()).add(problem.field)
        assert problem.file == "train.jsonl" and problem.found and problem.expected and problem.remedy
    missed = {name: field for row, (name, field) in expected.items() if row not in found}
    assert not missed
    wrong = {name: (field, found[row]) for row, (name, field) in expected.items() if field not in found[row]}
    assert not wrong
    assert not set(found) - set(expected)
    assert report.read == len(rows) and report.kept == len(rows) - len(expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_one_clear_problem(fault, tmp_path):
    broken, field = FAULTS[fault]
    row = broken(tmp_path, good_row(5, tmp_path))
    report = check_data(write_rows(tmp_path, [good_row(0, tmp_path), row]))
    assert [problem.field for problem in report.problems] == [field], [str(problem) for problem in report.problems]
    text = str(report.problems[0])
    assert "row 2" in text and len(text) < 700 and "Traceback" not in text


def test_no_false_alarm_on_a_thousand_good_rows(tmp_path):
    report = check_data(write_rows(tmp_path, [good_row(index, tmp_path) for index in range(1000)]), workers=2)
    assert report.good and not report.warnings and report.kept == report.read == 1000


def test_odd_files_of_lines(tmp_path):
    row = json.dumps(good_row(5, tmp_path)).encode()
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n")
    assert check_data(tmp_path).good and check_data(tmp_path).read == 1
    path.write_bytes(b"")
    assert "an empty file" in check_data(tmp_path).problems[0].found
    path.write_bytes(b'{"question": "' + b"a" * (17 << 20) + b'"}\n' + row)
    report = check_data(tmp_path)
    assert [problem.row for problem in report.problems] == [1] and report.read == 2
    path.write_bytes(row)  # no line end
    assert check_data(tmp_path).good
    path.write_bytes(b"[" * 100_000 + b"\n" + row)
    assert [problem.field for problem in check_data(tmp_path).problems] == ["line"]


@pytest.mark.parametrize(
    "name, data",
    [
        ("a b.jpg", jpeg()),
        ("ü\u0308 日本.jpg", jpeg()),
        ("e" * 240 + ".jpg", jpeg()),
        ("sub/dir/a.jpg", jpeg()),
        ("one.png", png(np.zeros((1, 1), np.uint8))),
        ("line.png", png(np.zeros((1, 5000), np.uint8))),
        ("column.png", png(np.zeros((5000, 1), np.uint8))),
        ("widest.png", png(np.zeros((2, 32_767), np.uint8))),
        ("progressive.jpg", jpeg(progressive=True)),
        ("422.jpg", jpeg(subsampling="4:2:2")),
        ("icc.jpg", jpeg(icc_profile=b"no profile at all")),
        ("exif.jpg", jpeg().replace(b"Exif", b"Exog")),
        ("sixteen.png", png(ramp())),
        ("cmyk.jpg", BytesIO()),
        ("clear.png", png(np.zeros((9, 9, 4), np.uint8))),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_odd_but_good_pictures_and_names_pass(name, data, tmp_path):
    if isinstance(data, BytesIO):
        Image.new("CMYK", (9, 9)).save(data, "JPEG")
        data = data.getvalue()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
    (record,) = open_data(write_rows(tmp_path, [{"image": name, "question": "What?", "answer": "That."}]))
    assert record["image"]["bytes"] == data


def test_depth_whose_scale_is_the_other_way_round_is_noticed(tmp_path):
    rows = [{**good_row(6 * index + 5, tmp_path), "depth": "depth.png"} for index in range(10)]
    (tmp_path / "metres.npy").write_bytes(npy(ramp().astype(float)[::-1]))
    (tmp_path / "flat.png").write_bytes(png(np.full((HEIGHT, WIDTH), 7, np.uint16)))
    assert not check_data(write_rows(tmp_path, rows)).warnings
    upside = [{**row, "depth": "metres.npy"} for row in rows]
    assert "depth_kind" in check_data(write_rows(tmp_path, upside)).warnings[0].remedy
    assert "one scale for all" in check_data(write_rows(tmp_path, rows[:6] + upside[6:])).warnings[0].expected
    right = [{**row, "depth_kind": "metres"} for row in upside]
    assert not check_data(write_rows(tmp_path, right)).warnings
    assert (
        check_data(write_rows(tmp_path, [{**rows[0], "depth": "flat.png"}])).warnings[0].found
        == "one value everywhere"
    )


def test_no_file_is_decoded_twice(tmp_path, monkeypatch):
    """A large data set is checked at the speed of its decoding; the pixels of each picture are asked for once."""
    from PIL import JpegImagePlugin

    loaded = []
    original = JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "load", lambda self: (self.tile and loaded.append(1), original(self))[1]
    )
    check_data(write_rows(tmp_path, [good_row(index, tmp_path) for index in range(12)]), workers=1)
    assert len(loaded) == 12


OPENED: list[str] = []
AUDITING = []


def _audit(event, arguments):
    if AUDITING and event == "open" and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


def test_nothing_outside_the_folder_is_opened(tmp_path):
    """Every open of the process is watched while a folder full of traps is checked."""
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (root / "link").symlink_to(tmp_path)
    row = good_row(5, root)
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link/secret.jpg", "./../secret.jpg", "a/../../secret.jpg"]
    rows = [{**row, "id": f"{field}{name}", field: name} for name in names for field in ("image", "mask", "depth")]
    write_rows(root, rows)
    check_data(tmp_path / "data", workers=1)
    sys.addaudithook(_audit)
    AUDITING.append(1)
    try:
        report = check_data(root, workers=1)
    finally:
        AUDITING.clear()
    assert len({problem.row for problem in report.problems}) == len(rows) and report.kept == 0
    assert not [path for path in OPENED if "secret" in path]


def test_the_command_line(tmp_path, capsys):
    root = tmp_path / "mine"
    root.mkdir()
    write_rows(root, [good_row(index, root) for index in range(3)])
    assert main(["data", "check", str(root), "--json", str(tmp_path / "r.json")]) == 0
    assert "3 rows: 3 good" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["kept"] == 3
    write_rows(root, [{**good_row(0, root), "answer": 3}])
    assert main(["data", "check", str(root)]) == 1
    assert "row 1, field `answer`: 3 (int); expected a text" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["data", "check", str(root), "--column", "x"]) == 2
    assert main(["data", "preview", str(root), "--out", str(tmp_path / "no" / "p.html")]) == 2
