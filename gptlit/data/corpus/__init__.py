"""Where text comes from: a name, a file, a glob, a folder, a URL or a hub id becomes a `Corpus` of two parts."""

from gptlit.data.corpus.load import Corpus, iter_text, load_corpus

__all__ = ["Corpus", "iter_text", "load_corpus"]
