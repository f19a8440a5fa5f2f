"""The page: one HTML file that shows what was looked up for each token, and needs nothing but itself.

No address stands in it, and its content security policy allows no request, and no script and no style but its own. What
the page shows is data: JSON in an element of its own, which the script puts into the page as text. The few texts in the
markup are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from memtrans.inspection.records import Records, Written
from memtrans.storage import write_atomically

MOST = 5_000_000  # bytes of a page
AROUND = 200  # tokens shown on either side of a passage
BEFORE, AFTER = 8, 4  # tokens shown around an entry
USUAL = 8  # entries shown that stand in the background
BINS = 240  # of the strip


class Detail(NamedTuple):
    """How much a page holds of each token and layer: `entries`, with what each head gives them or without."""

    entries: int
    heads: bool
    around: int = AROUND


LEVELS = (Detail(16, True), Detail(16, False), Detail(8, False), Detail(3, False), Detail(1, False, 60))


def write_page(path: str | Path, records: Records) -> Detail:
    """Writes the page, atomically; returns how much it holds.

    Raises ValueError where even the least of it is too much for one page.
    """
    for detail in LEVELS:
        page = page_of(records, detail).encode(errors="replace")  # names of files may be no UTF-8
        if len(page) < MOST:
            write_atomically(Path(path), page)
            return detail
    raise ValueError(f"tokens must be fewer for a page of {MOST} bytes, got {len(records.written)}")


def page_of(records: Records, detail: Detail = LEVELS[0]) -> str:
    """The page as text."""
    parts = {name: files(__package__).joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    texts = {
        **parts,
        "css_hash": _hash(parts["css"]),
        "js_hash": _hash(parts["js"]),
        "title": html.escape(f"What {records.model} remembered of {records.source}"),
        "written": html.escape(records.prompt + "".join(token.text for token in records.written)),
        "data": as_script_data(data_of(records, detail)),
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: texts[place[1]], template)  # once: a text may hold such braces


def as_script_data(data: Any) -> str:
    """JSON that ends no element and begins none.

    >>> as_script_data({"text": "</script><img src=x>"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u003cimg src=x\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # halves of a character are none


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ----------------------------------------------------------------------------------------------------------- the data


def data_of(records: Records, detail: Detail) -> dict[str, Any]:
    """What the script of the page reads; shares are in hundredths of a percent."""
    written = [token for token in records.written if token.text]  # of a character of several bytes, the first
    tokens, shown = list[dict[str, Any]](), set[int]()
    for token in written:
        passages = records.passages(token)
        usual = records.usual(token, USUAL)
        for passage in passages:
            shown.update(records.around(passage.begin, passage.end, detail.around))
        _show_around(records, (position for position, _ in usual), shown)
        tokens.append(
            {
                "text": token.text,
                "share": _points(records.from_memory[token.query]),
                "passages": [_passage(records, token, *passage) for passage in passages],
                "usual": [[position, _points(share)] for position, share in usual],
                "layers": [],
            }
        )
    for layer in records.trace.layers:
        for described, entries in zip(tokens, _entries(records, layer, written, detail), strict=True):
            described["layers"].append(entries)
            _show_around(records, (entry[0] for entry in entries["best"]), shown)
    strings, pieces = _texts(records, shown)
    return {
        "source": records.source,
        "model": records.model,
        "prompt": records.prompt,
        "length": len(records.document),
        "around": detail.around,
        "entries": detail.entries,
        "heads": detail.heads,
        "layers": [records.names.get(layer, f"layer {layer}") for layer in records.trace.layers],
        "strip": _strip(records, written),
        "tokens": tokens,
        "strings": strings,
        "pieces": pieces,
    }


def _points(share: float) -> int:
    return round(10_000 * share)


def _passage(
    records: Records, token: Written, begin: int, end: int, share: float, positions: tuple[int, ...]
) -> dict[str, Any]:
    own = records.shares.of(token.query)
    lifts = dict(zip(own.position.tolist(), own.lift.tolist(), strict=True))
    marks = [[position, _points(lifts[position])] for position in positions]
    return {"begin": begin, "end": end, "share": _points(share), "marks": marks}


def _show_around(records: Records, positions: Any, shown: set[int]) -> None:
    for position in positions:
        shown.update(records.around(position, position + 1, BEFORE, AFTER))


def _entries(records: Records, layer: int, written: list[Written], detail: Detail) -> list[dict[str, Any]]:
    """Of each token the layer's share, and its best entries: position, share, background, pairs of head and share."""
    trace, row = records.trace, records.row
    shares, positions, weights = trace.shares(row, layer), trace.positions(row, layer), trace.weights(row, layer)
    heads, found = positions.shape[0], []
    for token in written:
        own = shares.of(token.query)
        by_head = _by_position(positions[:, token.query], weights[:, token.query]) if detail.heads else {}
        best = [
            [
                int(own.position[place]),
                _points(float(own.share[place])),
                _points(float(own.background[place])),
                [number for head, w in by_head.get(int(own.position[place]), ()) for number in (head, _points(w))],
            ]
            for place in own.best(detail.entries)
        ]
        found.append({"share": _points(float(weights[:, token.query].sum()) / heads), "best": best})
    return found


def _by_position(positions: Tensor, weights: Tensor) -> dict[int, list[tuple[int, float]]]:
    """Heads and weights of each position, of (H, K) each; without those that round to nothing."""
    found: dict[int, list[tuple[int, float]]] = {}
    for head, pairs in enumerate(zip(positions.tolist(), weights.tolist(), strict=True)):
        for position, weight in zip(*pairs, strict=True):
            if position >= 0 and _points(weight) > 0:
                found.setdefault(position, []).append((head, weight))
    return found


def _strip(records: Records, written: list[Written]) -> list[int]:
    """What all tokens looked up, by its place in the document: BINS numbers in [0, 100]."""
    own = records.shares.among([token.query for token in written])
    bins = [0.0] * BINS
    for position, lift, usual in zip(own.position.tolist(), own.lift.tolist(), own.is_usual.tolist(), strict=True):
        if not usual and position < len(records.document):
            bins[position * BINS // len(records.document)] += lift
    highest = max(bins) or 1.0
    return [round(100 * (height / highest) ** 0.5) for height in bins]  # so that little shows beside much


def _texts(records: Records, shown: set[int]) -> tuple[list[str], list[list[Any]]]:
    """The document's text where it is shown: different strings, and pieces of a beginning and numbers of strings."""
    numbers: dict[str, int] = {}
    pieces: list[list[Any]] = []
    for position in sorted(place for place in shown if place < len(records.document)):
        if not pieces or pieces[-1][0] + len(pieces[-1][1]) != position:
            pieces.append([position, []])
        pieces[-1][1].append(numbers.setdefault(records.document[position], len(numbers)))
    return list(numbers), pieces
