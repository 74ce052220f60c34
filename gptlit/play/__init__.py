"""Trained models as an interactive page: one HTML file, and a tab in TensorBoard.

The names are loaded on first use: TensorBoard imports this package at every start, and torch takes seconds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptlit.play.page_file import Playable, page, read_runs, write_page

__all__ = ["Playable", "page", "read_runs", "write_page"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'gptlit.play' has no attribute {name!r}")
    from gptlit.play import page_file

    return getattr(page_file, name)
