"""The preview page: what stands on it is what the model will see, and no text of a record acts as markup."""

import re
from html.parser import HTMLParser

import pytest
from own_samples import good_row, write_rows

from perceptio.cli import main
from perceptio.data.page import write_preview

EVIL = "<script>alert(1)</script>\"'&amp; {{ 7*7 }} [SEG]"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def folder(tmp_path):
    rows = [good_row(index, tmp_path) for index in range(6)]
    rows[1] |= {"question": EVIL, "answer": EVIL, "id": "<b>bold</b>"}
    rows.append({**good_row(9, tmp_path), "image": "nowhere.jpg"})
    return write_rows(tmp_path, rows)


def test_the_page_is_well_formed_self_contained_and_escapes_every_text(folder, tmp_path):
    report = write_preview(folder, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not tags.open and "script" not in tags.seen and "b" not in tags.seen
    assert tags.seen.count("article") == 6 == report.kept
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert tags.seen.count("img") == 6 + 4 + 2  # a picture each, masks in four, depth in two
    assert "nowhere.jpg" in text and "1 with problems (1 in all)" in text
    assert "[SEG] &lt;d_start&gt; d … d &lt;d_end&gt; " in text


def test_with_a_model_the_exact_tokens_stand_there(folder, tmp_path, tiny_folder):
    write_preview(folder, tmp_path / "p.html", model=tiny_folder(), count=4)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert re.search(r"\[SEG\]&lt;d_start&gt;(&lt;d_\d+&gt;){9}&lt;d_end&gt;", text)
    counts = [
        (int(total), int(learned)) for total, learned in re.findall(r"(\d+) tokens, (\d+) of them learned", text)
    ]
    assert len(counts) == 4 and all(0 < learned < total for total, learned in counts)


def test_count_and_place_are_checked_before_anything_is_read(folder, tmp_path, capsys):
    assert main(["data", "preview", str(folder), "--out", str(tmp_path / "p.html"), "--count", "0"]) == 2
    assert "`count` is 0" in capsys.readouterr().err and not (tmp_path / "p.html").exists()
