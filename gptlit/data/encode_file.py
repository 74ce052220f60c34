"""A long text as a token file that is kept: encoded on all cores, continued after an interruption."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptlit.data.cache import building, console, progress
from gptlit.data.reading import Parts
from gptlit.data.tokens import DamagedFileError, TokenFile, TokenWriter
from gptlit.errors import UserError
from gptlit.tokenizer import CharTokenizer, Tokenizer
from gptlit.tokenizer.characters import smallest_dtype


def token_file(
    path: Path, tokenizer: Tokenizer, parts: Callable[[], Iterator[tuple[int, str]]], characters: int
) -> TokenFile:
    """Return the token file at `path`; written when it is missing or damaged.

    Encoding uses all cores and memory for a few pieces. It continues where an earlier start was interrupted.
    """
    if file := opened(path):
        return file
    with building(path):
        if file := opened(path):  # another process wrote it meanwhile
            return file
        try:
            with progress("encoding", characters) as advance:
                write_tokens(path, tokenizer, parts(), characters, advance)
        except (KeyboardInterrupt, SystemExit):
            console().print("stopped while encoding: the next start continues from there", style="yellow")
            raise
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror or error}): make room, or set XDG_CACHE_HOME to another folder"
            ) from error
    console().print(f"token file {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    return TokenFile(path)


def opened(path: Path) -> TokenFile | None:
    """Return the token file, or None when there is none; a damaged one is removed, with a line that says so."""
    try:
        return TokenFile(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        console().print(f"the token file {path} is damaged ({error}): it is written again", style="yellow")
        path.unlink(missing_ok=True)
        return None


def write_tokens(
    path: Path,
    tokenizer: Tokenizer,
    parts: Parts,
    characters: int,
    advance: Callable[[int], None],
) -> None:
    """Encode pieces into a token file, in order; several at once, since both tokenizers release the GIL.

    Raises:
        UserError: they do not have as many characters as the text was found to have.
    """
    threads = max(2, (os.cpu_count() or 1) // 8)  # the BPE library has threads of its own for each piece
    waiting: deque[tuple[int, int, Future[np.ndarray]]] = deque()
    with TokenWriter(path, smallest_dtype(tokenizer.vocab_size)) as writer, ThreadPoolExecutor(threads) as pool:

        def write_one() -> None:
            part, length, ids = waiting.popleft()
            writer.append(part, ids.result())
            advance(length)

        done = writer.pieces
        for number, (part, text) in enumerate(whole_parts(parts, tokenizer)):
            characters -= len(text)
            if number < done:
                advance(len(text))
                continue
            waiting.append((part, len(text), pool.submit(tokenizer.encode_array, text)))
            if len(waiting) > threads:
                write_one()
        while waiting:
            write_one()
        if characters:
            raise UserError("has changed while it was read: start again when the text is complete", "corpus")
        writer.finish()


def whole_parts(parts: Parts, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text as this tokenizer may read them: joined, where its tokens may span any cut."""
    if isinstance(tokenizer, CharTokenizer) or tokenizer.splits_words:
        yield from parts
        return
    for part, pieces in itertools.groupby(parts, key=lambda piece: piece[0]):
        yield part, "".join(text for _, text in pieces)
