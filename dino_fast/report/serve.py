"""The page of a run that goes on, served to this machine alone."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dino_fast.errors import UserError
from dino_fast.report.page import Report

EVERY = 10  # seconds between two looks of an open page
_HOST = "127.0.0.1"


def open_server(report: Report, port: int) -> ThreadingHTTPServer:
    """A server of `report` on 127.0.0.1, not yet serving; port 0 takes a free one. Raises UserError for a taken one.

    Each request draws the page anew where the run has gone on since.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere on the web can point a name of its own at 127.0.0.1; its requests carry that name.
            if self.headers.get("Host", "").rpartition(":")[0] not in (_HOST, "localhost"):
                self._answer(403, "text/plain", "this page is served to 127.0.0.1 only")
            elif self.path != "/":
                self._answer(404, "text/plain", "the report is at /")
            else:
                try:
                    with lock:
                        status, kind, text = 200, "text/html", report.page()
                except UserError as error:
                    status, kind, text = 500, "text/plain", str(error)
                self._answer(status, kind, text)

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Refresh", str(EVERY))  # of a message too, so that the page comes back by itself
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing: a line every ten seconds would hide what matters."""

    try:
        return ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {port} of this machine cannot be used ({error.strerror or error}); give another one, or 0 for any"
        ) from error


def serve(server: ThreadingHTTPServer) -> None:
    """Serves until Ctrl-C."""
    try:
        server.serve_forever()
    finally:
        server.server_close()
