"""Corpora: a name, file, glob, folder, URL or hub id becomes documents, and these one text in two parts."""

from gptlit.data.corpus.load import Corpus, TextSpec, open_corpus

__all__ = ["Corpus", "TextSpec", "open_corpus"]
