"""Helpers of the corpus tests: read a text, or the error that refuses it."""

from pathlib import Path

import pytest

from gptlit.data.corpus import TextSpec, open_corpus
from gptlit.errors import UserError


def text_of(corpus: str | list[str], **settings: object) -> str:
    """Return the text of both parts."""
    opened = open_corpus(TextSpec(corpus, **settings))  # type: ignore[arg-type]
    return "".join(text for _, text in opened.parts())


def part_of_text(number: int, corpus: str | list[str], **settings: object) -> str:
    """Return the text of one part, as the corpus numbers them."""
    opened = open_corpus(TextSpec(corpus, **settings))  # type: ignore[arg-type]
    return "".join(text for part, text in opened.parts() if part == number)


def refusal(corpus: str | list[str], **settings: object) -> str:
    """Return the one-line error with which a corpus is refused."""
    with pytest.raises(UserError) as caught:
        text_of(corpus, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test an empty cache and no proxy; returns the folder of token files."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return folder / "gptlit" / "tokens"
