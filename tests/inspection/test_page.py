"""The page as a file: one, small, and data in it is data. What it does when it is opened is in `test_browser.py`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.pages import COMMON, FACT, HEADS, PLANTED, PROMPT, records

from memtrans.inspection.page import MOST, data_of, page_of, write_page
from memtrans.inspection.passages import passages_of
from memtrans.inspection.records import to_json
from memtrans.inspection.texts import texts_of_bytes, texts_of_offsets

pytestmark = pytest.mark.cpu


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_what_was_written_and_read_is_data_whatever_it_holds() -> None:
    page = page_of(records())
    tags = [tag for tag, _ in Elements(page).found]
    assert "img" not in tags and tags.count("script") == 2 and PLANTED not in page
    data = embedded(page)
    assert data["tokens"][3]["text"] == " " + PLANTED
    assert " " + PLANTED in data["strings"]


def test_a_source_whose_name_is_no_utf_8_has_a_page(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", replace(records(), source="book\udcff.txt"))
    assert "book?.txt" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_leads_out_of_the_page() -> None:
    page = page_of(records())
    leading = {"src", "href", "action", "srcset", "data", "poster", "formaction", "background"}
    for _, attributes in Elements(page).found:
        assert not leading & set(attributes) or attributes.get("href") == "data:,"
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    policy = next(a["content"] for _, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write|eval\(", page
    )


def test_a_token_has_its_passages_its_layers_and_apart_what_is_usual() -> None:
    data = data_of(records(), detail=page_of.__defaults__[0])
    last = data["tokens"][-1]
    assert [mark[0] for mark in last["passages"][0]["marks"]] == [FACT + 19]
    assert last["passages"][0]["share"] == 5100 and last["usual"] == [[COMMON, 1000]]
    assert last["share"] == 10_000 * 0.618
    assert data["layers"] == ["layer 0", "layer 2"]
    best = last["layers"][1]["best"][0]
    assert best == [FACT + 19, 5100, 0, [0, 5100, 1, 5100, 2, 5100]]
    shown = {place for begin, numbers in data["pieces"] for place in range(begin, begin + len(numbers))}
    assert set(range(FACT + 19 - 200, FACT + 20 + 200)) <= shown


def test_a_million_tokens_are_a_page_below_five_megabytes(tmp_path: Path) -> None:
    detail = write_page(tmp_path / "page.html", records(tokens=256, document=1_000_000, layers=4))
    assert (tmp_path / "page.html").stat().st_size < MOST == 5_000_000
    assert detail.entries == 16 and detail.heads


def test_a_page_that_would_be_too_large_leaves_heads_and_entries_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memtrans.inspection.page.MOST", 50_000)
    detail = write_page(tmp_path / "page.html", records(layers=6))
    assert detail.entries <= 16 and not detail.heads and (tmp_path / "page.html").stat().st_size < 50_000
    monkeypatch.setattr("memtrans.inspection.page.MOST", 1000)
    with pytest.raises(ValueError, match="tokens must be fewer for a page of 1000 bytes, got 20"):
        write_page(tmp_path / "other.html", records())
    assert not (tmp_path / "other.html").exists()


def test_the_file_of_all_entries_has_every_head() -> None:
    shown = json.loads(json.dumps(to_json(records())))
    assert len(shown["written"]) == 20 and shown["document_tokens"] == 3000
    token = shown["written"][5]
    assert list(token["layers"]) == ["layer 0", "layer 2"] and len(token["layers"]["layer 2"]) == HEADS
    assert token["layers"]["layer 2"][1][:2] == [[COMMON, 0.1], [FACT + 5, pytest.approx(0.01 + 2.5 / 19, abs=1e-6)]]
    assert token["passages"][0]["text"] == " fact5\n"
    assert records().from_memory[PROMPT + 4] == pytest.approx(token["share_from_memory"], abs=1e-6)


def test_passages_do_not_overlap_and_begin_where_something_was_found() -> None:
    position = torch.tensor([100, 110, 131, 132, 200])
    share = torch.tensor([0.3, 0.2, 0.3, 0.4, 0.02])
    found = passages_of(position, share, share, top=9)
    assert [(passage.begin, passage.end) for passage in found] == [(110, 133), (100, 101), (200, 201)]
    assert [round(passage.share, 2) for passage in found] == [0.9, 0.3, 0.02]
    assert passages_of(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0), top=2) == []


@pytest.mark.parametrize("text", ["plain", "", "né – 日本 🙂\n", "a\u2028b"])
def test_texts_of_tokens_are_the_whole_text(text: str) -> None:
    assert "".join(texts_of_bytes(text.encode())) == text
    assert len(texts_of_bytes(text.encode())) == len(text.encode())
    middle = len(text) // 2
    assert "".join(texts_of_offsets(text, [(0, middle), (middle, len(text))])) == text
