"""The report of a run that goes on, served to this machine's browser and made anew when its files change."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from bilect.errors import BilectError
from bilect.report.inputs import read_run
from bilect.report.page import encoded, render
from bilect.runtime.files import content_hash

__all__ = ["WatchServer", "serve"]

HOST = "127.0.0.1"
_WATCHED = (  # what the report reads and a run writes; patterns below the run directory
    "*.json", "config.yaml", "round-*/*.json*", "round-*/selected/*.parquet", "round-*/target/*.json*",
    "controls/*/round-*/*.json", "controls/*/round-*/target/*.json*", ".partial/*/round-*/*.jsonl",
    ".partial/*/round-*/target/*.json*", ".partial/*/controls/*/round-*/target/*.json*",
)  # fmt: skip


def serve(run_dir: Path, port: int = 0, on_start: Callable[[str], None] = print) -> None:
    """Serve the report of a run until interrupted (Ctrl-C).

    Args:
        run_dir: a run directory; it may hold no results yet.
        port: 0 for a free one.
        on_start: called with the address.

    Raises:
        BilectError: no run directory, or a port that cannot be had.
    """
    with WatchServer(run_dir, port) as server:
        on_start(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class WatchServer(ThreadingHTTPServer):
    """The report of one run at ``url``; only for this machine, and only under its own name.

    A page elsewhere that has its name resolved to this machine (DNS rebinding) is refused by the request's Host.
    """

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int = 0) -> None:
        if not (run_dir / "run.json").is_file() and not (run_dir / "config.yaml").is_file():
            raise BilectError(f"watch: {run_dir} is not a run directory (no run.json)")
        self.run_dir, self._lock, self._made = run_dir, Lock(), ("", b"")
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise BilectError(
                f"watch: port {port} cannot be used ({error}); leave --port out for a free one"
            ) from error
        self.url = f"http://{HOST}:{self.server_port}/"
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def version(self) -> str:
        """Of the files that the report reads: changes when one of them does."""
        found = []
        for pattern in _WATCHED:
            for path in sorted(self.run_dir.glob(pattern)):
                try:
                    stat = path.stat()
                except FileNotFoundError:  # moved into its place in between
                    continue
                found.append((path.as_posix(), stat.st_mtime_ns, stat.st_size))
        return content_hash(json.dumps(found))

    def page(self) -> bytes:
        """The report of the files as they are."""
        with self._lock:
            version = self.version()
            if self._made[0] != version:
                self._made = (version, encoded(render(read_run(self.run_dir), live=version)))
            return self._made[1]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    timeout = 30

    def do_GET(self) -> None:
        """The page and its version; nothing else of the machine."""
        if self.headers.get("Host", "") not in self.server.names:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this address is for this machine only\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.server.page())
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, "text/plain", self.server.version().encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"only / is here\n")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A line per request would bury the address."""
