"""What a model's memories hold: the entries of what is read, and of what an evaluation amid training reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from memtrans.hf.entries import Entries, bytes_per_document
from memtrans.hf.probe import Layer
from memtrans.hf.settings import MemorySettings

READ, EVALUATED = "read", "evaluated"  # the places that hold entries
LARGE = 1 << 30  # bytes from which a memory is announced as a warning

log = logging.getLogger("memtrans.hf")


class Held:
    """The entries of each place; a place that nothing was read into has none.

    Args:
        layers: by number. settings: of `add_memory`. entries: by place, what a copy holds from the beginning.
    """

    def __init__(
        self, layers: Mapping[int, Layer], settings: MemorySettings, entries: dict[str, Entries] | None = None
    ) -> None:
        self.layers, self.settings = layers, settings
        self._entries = {} if entries is None else entries

    def at(self, place: str) -> Entries | None:
        """What a place holds; None for nothing."""
        return self._entries.get(place)

    def put(self, place: str, entries: Entries) -> None:
        """The place holds these entries, and no others."""
        self._entries[place] = entries

    def forget(self, place: str) -> None:
        """The place holds nothing, and what it held is freed."""
        self._entries.pop(place, None)

    def clear(self) -> None:
        """No place holds anything."""
        self._entries.clear()

    def lay_out(self, place: str, documents: int, as_they_are: bool) -> None:
        """The place holds empty memories of so many documents, whose bytes are logged first; see `Entries`."""
        size = documents * bytes_per_document(self.layers, self.settings, as_they_are)
        text = f"a memory of {documents} documents in {len(self.layers)} layers takes {size / 1e9:.2f} GB"
        log.log(logging.WARNING if size >= LARGE else logging.INFO, text)
        self.put(place, Entries(self.layers, self.settings, documents, as_they_are))

    def for_rows(self, place: str, rows: int, questions: int) -> Entries | None:
        """What a pass of so many rows looks at, moved to where its layers are; None where the place has nothing for it.

        questions: how many rows stand behind each document. Raises ValueError for rows of other documents than those
        that the place holds; documents without an entry are nothing, and others may take their place.
        """
        held = self.at(place)
        if held is None:
            return None
        if held.documents * questions == rows:
            held.follow(self.layers)
            return held
        if int(held.lengths.max()) > 0:
            raise ValueError(
                f"a pass must have {questions} rows for each of the {held.documents} documents that the memory "
                f"holds, got {rows} rows: reset() forgets them, inside expand(n) a document has n rows"
            )
        return None

    def lasting(self) -> dict[str, Entries]:
        """What a copy holds and a file keeps, by place: what was read, but for an evaluation or as a lesson."""
        return {place: held for place, held in self._entries.items() if place == READ and not held.as_they_are}
