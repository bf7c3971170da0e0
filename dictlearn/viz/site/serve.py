"""Serve a site on the loopback interface."""

from __future__ import annotations

import contextlib
import functools
import webbrowser
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""

    def end_headers(self) -> None:
        """Let a rebuilt site show, and nothing but the site's own files run."""
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a folder on 127.0.0.1, not yet running.

    Raises
    ------
    FileNotFoundError
        There is no site in the folder.
    OSError
        The port is taken.
    """
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(
            f"no site at {folder}: dictlearn view STORE DICTIONARY --out FOLDER"
        )
    handler = functools.partial(_Quiet, directory=str(folder))
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def serve(
    folder: Path, *, port: int = 0, on_start: Callable[[str], None], browser: bool = True
) -> None:
    """Serve until interrupted."""
    with server(folder, port) as running:
        url = f"http://127.0.0.1:{running.server_address[1]}/"
        on_start(url)
        if browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            running.serve_forever()
