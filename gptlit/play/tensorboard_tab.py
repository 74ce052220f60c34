"""The page as a tab of TensorBoard: runs below --logdir that hold a checkpoint.

TensorBoard imports this module at every start, also for users who never open the tab, and does not start at all if that
fails. So it needs the standard library, werkzeug and tensorboard alone; torch is imported when a run is shown.
"""

import html
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from tensorboard.plugins import base_plugin
from werkzeug.wrappers import Request, Response

CHECKPOINTS = ("best.ckpt", "last.ckpt")
PATIENCE = 0.05  # seconds that a page load of TensorBoard waits for the first look at the folders
MOST_FOLDERS = 20_000  # looked at below --logdir
View = Callable[["PlayPlugin", Request], Response]


def guarded(view: View) -> Callable[..., Any]:
    """Turn a view into a WSGI application that refuses other methods and sites, and never raises."""

    @wraps(view)
    def application(self: "PlayPlugin", environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        if request.method not in ("GET", "HEAD"):
            answer = respond(request, "only GET and HEAD", "text/plain", code=405, headers=[("Allow", "GET, HEAD")])
        elif request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            answer = respond(request, "requests from other sites are refused", "text/plain", code=403)
        else:
            try:
                answer = view(self, request)
            except Exception as error:
                logging.getLogger("gptlit").exception("the tab of gptlit failed")
                answer = message_page(request, f"{type(error).__name__}: {error}", 500)
        return answer(environ, start_response)

    return application


class PlayPlugin(base_plugin.TBPlugin):
    """Lists runs and serves their pages."""

    plugin_name = "gptlit_play"

    def __init__(self, context: Any) -> None:
        self.context = context
        self._found = False  # a run; looked for in the background
        self._search: threading.Thread | None = None

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes, below /data/plugin/gptlit_play."""
        return {"/index.js": self.serve_script, "/runs": self.serve_runs, "/model.html": self.serve_page}

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and entry point."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Play")

    def is_active(self) -> bool:
        """Return whether a run has been found, at once: TensorBoard asks before it shows any tab."""
        if not self._found and (self._search is None or not self._search.is_alive()):
            self._search = threading.Thread(target=self._look, daemon=True)
            self._search.start()
            self._search.join(PATIENCE)
        return self._found

    def _look(self) -> None:
        try:
            self._found = next(self.iter_runs(), None) is not None
        except Exception:  # an unreadable folder
            logging.getLogger("gptlit").debug("no look at the runs", exc_info=True)

    def iter_runs(self) -> Iterator[tuple[str, Path]]:
        """Yield names and folders of runs with a checkpoint; all lie inside of the folders that TensorBoard shows."""
        for prefix, root in self.roots():
            inside = Path(os.path.realpath(root))
            for folder in folders_below(inside):
                name = "/".join(filter(None, (prefix, *folder.relative_to(inside).parts))) or inside.name
                if any(is_file_inside(folder / checkpoint, inside) for checkpoint in CHECKPOINTS):
                    yield name, folder

    def roots(self) -> list[tuple[str, str]]:
        """Return the folders of --logdir, or of --logdir_spec with their names."""
        if self.context.logdir:
            return [("", os.path.expanduser(self.context.logdir))]
        multiplexer = self.context.multiplexer
        return [] if multiplexer is None else sorted(multiplexer.RunPaths().items())

    @guarded
    def serve_script(self, request: Request) -> Response:
        """Answer with the module that fills the tab."""
        script = (Path(__file__).parent / "tensorboard_tab.js").read_text(encoding="utf-8")
        return respond(request, script, "application/javascript")

    @guarded
    def serve_runs(self, request: Request) -> Response:
        """Answer with the names of the runs, newest checkpoint first."""
        runs = sorted(self.iter_runs(), key=lambda run: (-newest_change(run[1]), run[0]))
        return respond(request, [name for name, _ in runs], "application/json")

    @guarded
    def serve_page(self, request: Request) -> Response:
        """Answer with the page of the runs `?run=NAME&run=…`; `theme` is light or dark."""
        runs, names = dict(self.iter_runs()), request.args.getlist("run")
        unknown = [name for name in names if name not in runs]
        if unknown or not names:
            return message_page(request, f"there is no run {unknown[0]!r} here" if unknown else "choose a run", 404)
        from gptlit.errors import UserError
        from gptlit.play.page_file import page, read_run, script_text, sha256

        try:
            document = page({name: read_run(checkpoint_of(runs[name])) for name in names})
        except UserError as error:
            return message_page(request, str(error), 400)
        if request.args.get("theme") in ("light", "dark"):
            document = document.replace("<html ", f'<html data-theme="{request.args["theme"]}" ', 1)
        return respond(request, document, "text/html", csp_scripts_sha256s=[sha256(script_text())])


def folders_below(root: Path) -> Iterator[Path]:
    """Yield a folder and those below it, without following links, `MOST_FOLDERS` at most."""
    for count, (folder, names, _) in enumerate(os.walk(root)):
        if count >= MOST_FOLDERS:
            return
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(folder)


def is_file_inside(path: Path, root: Path) -> bool:
    """Return whether a path is a file below a folder, links resolved."""
    return path.is_file() and Path(os.path.realpath(path)).is_relative_to(root)


def checkpoint_of(folder: Path) -> Path:
    """Return the checkpoint of a run folder that is shown: best.ckpt, or last.ckpt without it."""
    return next(folder / name for name in CHECKPOINTS if (folder / name).is_file())


def newest_change(folder: Path) -> float:
    """Return when a checkpoint of a run was written last, in seconds since the epoch."""
    return max((folder / name).stat().st_mtime for name in CHECKPOINTS if (folder / name).is_file())


def respond(request: Request, content: Any, kind: str, **options: Any) -> Response:
    """Answer in TensorBoard's way, with its content security policy."""
    from tensorboard.backend import http_util

    return http_util.Respond(request, content, kind, **options)


def message_page(request: Request, message: str, code: int) -> Response:
    """Answer with a message instead of the page."""
    style = "font: 1rem system-ui, sans-serif; margin: 2rem; color-scheme: light dark"
    document = (
        f'<!doctype html><html lang="en"><body style="{style}"><p>gptlit: {html.escape(message)}</p></body></html>'
    )
    return respond(request, document, "text/html", code=code)
