"""One text or set of files that can be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptlit.data.corpus.documents import Pieces
from gptlit.data.corpus.files import Tally


@dataclass(frozen=True)
class Source:
    """One text or set of files.

    Attributes:
        name: short, for file names and messages.
        words: where it is, for messages.
        open: opens its files; each is an iterator of units, a unit the pieces of a text.
        files: on this machine, where the text is read from.
        several: whether there are several files, or members of an archive.
        rows: whether all units are rows of tables.
        tables: whether there is a table at all, also one that is left out because it lacks the column.
        streamed: whether the texts are those of a data set that streams from the hub.
        notice: files of a folder or an archive that are not read, for the user; empty when there are none.
        tally: rows of the tables that were read to their ends so far.
    """

    name: str
    words: str
    open: Callable[[], Iterator[Iterator[Pieces]]]
    files: tuple[Path, ...] = ()
    several: bool = False
    rows: bool = False
    tables: bool = False
    streamed: bool = False
    notice: str = ""
    tally: Tally = field(default_factory=dict)

    @property
    def rows_notice(self) -> str:
        """How many rows have no text, for the user; empty when there are none, or before the source was read."""
        rows, empty = (sum(counts[i] for counts in self.tally.values()) for i in (0, 1))
        if not empty:
            return ""
        table, first = next((where, first) for where, (_, _, first) in self.tally.items() if first)
        place = f"row {first:,}" + f" of {table}" * (len(self.tally) > 1)
        verb, others = ("has", "") if empty == 1 else ("have", "the first is ")
        return f"{empty:,} of {rows:,} rows of {self.words} {verb} no text: left out ({others}{place})"
