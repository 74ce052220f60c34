"""A local copy of a data set that streams from the hub."""

import json
import os
from collections.abc import Iterator

from gptlit.data.cache import FORMAT, building, hash_of, progress, token_folder
from gptlit.data.corpus.documents import Pieces
from gptlit.data.corpus.sources import Source


def kept(source: Source, text_column: str) -> Source:
    """Return a source that can be read again: of one that streams, the texts are kept, one JSON string a line."""
    if not source.streamed:
        return source
    path = token_folder() / f"{hash_of(source.words, text_column, FORMAT)}.texts"
    if not path.is_file():
        with building(path):
            if not path.is_file():
                temporary = path.with_suffix(".part")
                with progress("streaming", None) as advance, temporary.open("w", encoding="utf-8") as stream:
                    for file in source.open():
                        for unit in file:
                            advance(stream.write(json.dumps("".join(unit)) + "\n"))
                os.replace(temporary, path)

    def units() -> Iterator[Pieces]:
        with path.open(encoding="utf-8") as stream:
            yield from ([json.loads(line)] for line in stream)

    return Source(source.name, source.words, lambda: iter([units()]), (path,), rows=True)
