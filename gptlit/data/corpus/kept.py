"""A local copy of a data set that streams from the hub."""

import json
from collections.abc import Iterator
from dataclasses import replace

from gptlit.checkpoint.atomic import flush_to_disk, rename
from gptlit.data.cache import FORMAT, building, hash_of, progress, token_folder
from gptlit.data.corpus.documents import Pieces
from gptlit.data.corpus.source import Source


def kept(source: Source, text_column: str) -> Source:
    """Return a source that can be read again: of one that streams, the texts are kept, one JSON string a line."""
    if not source.streamed:
        return source
    path = token_folder() / f"{hash_of(source.words, text_column, FORMAT)}.texts"
    if not path.is_file():
        with building(path):
            if not path.is_file():
                temporary = path.with_suffix(".part")  # of one name: the next start overwrites what a kill left
                with progress("streaming", None) as advance, temporary.open("wb") as stream:
                    for file in source.open():
                        for unit in file:
                            advance(stream.write(f"{json.dumps(''.join(unit))}\n".encode()))
                    flush_to_disk(stream)
                rename(temporary, path)

    def units() -> Iterator[Pieces]:
        with path.open(encoding="utf-8") as stream:
            yield from ([json.loads(line)] for line in stream)

    return replace(source, open=lambda: iter([units()]), files=(path,))
