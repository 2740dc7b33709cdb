"""The inspector on a page of this machine, where texts can be typed.

The server listens on the loopback address alone. A web page from elsewhere that the same browser shows could still send
requests to it, so it answers only those that name it as their host (a name that was pointed at 127.0.0.1 is another
host) and that come from its own page.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Generator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any

from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page

ADDRESS = "127.0.0.1"
MAX_BODY_BYTES = 1 << 20
# A client that sends nothing, or a byte now and then, may not hold a thread for good.
TIMEOUT_S = 30.0
MAX_CONNECTIONS = 64
# For what else a refused client sends.
MAX_DISCARDED_BYTES, DISCARD_S = 1 << 26, 1.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class _RefusedError(Exception):
    """A request that gets an error status and a sentence."""


class InspectorServer(ThreadingHTTPServer):
    """Serves the inspector's page and records the texts that it sends, one at a time.

    Args:
        inspector: of the one model in memory.
        port: where to listen; 0 takes a free one.
        first: a text that the page shows at first, `None` for an empty page.

    Attributes:
        url: where the page is.
        hosts: what a request may call this server.

    Raises:
        ValueError: if the port is taken or no port.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, inspector: Inspector, port: int = 0, first: list[dict[str, Any]] | None = None):
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"port must be free, got port={port}: {error}; choose another with --port") from error
        self.url = f"http://{ADDRESS}:{self.server_port}/"
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        self.inspector = inspector
        self.page = inspector_page(inspector_data(first or [], served=True)).encode()
        self.busy = threading.Lock()
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error; of anything else one line is said."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"The inspector failed to answer: {type(error).__name__}: {error}", file=sys.stderr)

    def record(self, request: dict[str, str]) -> dict[str, Any]:
        """The page's data for a request: a `text`, and one to `compare` it with if that is not empty."""
        texts = [NamedText("your text", request["text"])]
        if request.get("compare"):
            texts.append(NamedText("your second text", request["compare"]))
        with self.busy:
            return inspector_data([self.inspector.run(text) for text in texts], served=True)

    def generate(self, request: dict[str, str]) -> Generator[dict[str, Any]]:
        """Each token that follows the request's text, and at last the page's data of both together."""
        text = NamedText("your text, continued", request["text"])
        with self.busy:
            added = []
            for token in self.inspector.generate(text):
                added.append(token.pop("id"))
                yield token
            yield inspector_data([self.inspector.continued(text, added)], served=True)


class _Handler(BaseHTTPRequestHandler):
    server: InspectorServer
    timeout = TIMEOUT_S
    server_version, sys_version = "lte", ""
    # HTTP/0.9 has no status.
    default_request_version = "HTTP/1.0"
    rfile: Any

    def setup(self) -> None:
        """Gives a client so many seconds for all that it sends."""
        super().setup()
        self.late = threading.Timer(TIMEOUT_S, self._stop_reading)
        self.late.daemon = True
        self.late.start()

    def _stop_reading(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def handle(self) -> None:
        """Answers as long as there are not too many clients."""
        if not self.server.places.acquire(blocking=False):
            self.command, self.request_version, self.requestline = "POST", "HTTP/1.0", ""
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests at once; try again.")
            return
        try:
            super().handle()
        finally:
            self.server.places.release()

    def finish(self) -> None:
        """Ends the connection, which the client may have done already."""
        self.late.cancel()
        with contextlib.suppress(OSError):
            super().finish()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As the stock method, and reads on."""
        super().send_error(code, message, explain)
        self._discard()

    def do_GET(self) -> None:
        """Answers, or says in JSON why not."""
        try:
            if self.headers.get("Host") not in self.server.hosts:
                raise _RefusedError(HTTPStatus.FORBIDDEN, f"Open this page as {self.server.url}.")
            (self._page if self.command == "GET" else self._record)()
        except _RefusedError as refused:
            self._refuse(*refused.args)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError:
            raise  # The client went away.
        except Exception as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"The text failed with {type(error).__name__}: {error}")

    do_POST = do_GET

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send_json({"error": message}, status)
        if self.command == "POST":
            self._discard()

    def _page(self) -> None:
        if self.path != "/":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "There is one page here, at /.")
        self._send("text/html; charset=utf-8", self.server.page)

    def _record(self) -> None:
        if self.path not in ("/inspect", "/generate"):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "Texts go to /inspect or /generate.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Texts are taken from this server's own page alone.")
        # Forms of other pages cannot send this type without asking first.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Texts must come as application/json.")
        request = _parse(self._body())
        if self.path == "/inspect":
            self._send_json(self.server.record(request))
        else:
            self._send_lines(self.server.generate(request))

    def _send_lines(self, lines: Generator[dict[str, Any]]) -> None:
        """A line of JSON for each, until either side closes the connection."""
        with contextlib.closing(lines):
            # What is wrong with the text comes out with the first.
            first = next(lines)
            self._send("application/x-ndjson")
            for line in chain([first], lines):
                self.wfile.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "A request must say its length.")
        if int(length) > MAX_BODY_BYTES:
            limit = f"{MAX_BODY_BYTES:,} bytes"
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Texts must be at most {limit} together.")
        try:
            found = self.rfile.read(int(length))
        except TimeoutError:
            found = b""
        self.late.cancel()
        if len(found) < int(length):
            rule = f"A request must send the {length} bytes that it announces within {TIMEOUT_S:.0f} s."
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, rule)
        return found

    def _discard(self) -> None:
        """Reads what a refused client goes on sending: a closed connection would take the answer from it."""
        with contextlib.suppress(OSError):
            # The answer is complete: a client that waits for the end has it now.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(DISCARD_S)
            end, left = time.monotonic() + TIMEOUT_S, MAX_DISCARDED_BYTES
            while left > 0 and time.monotonic() < end and (found := self.rfile.read1(MAX_BODY_BYTES)):
                left -= len(found)

    def _send_json(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send("application/json", json.dumps(content, allow_nan=False).encode(), status)

    def _send(self, kind: str, content: bytes = b"", status: HTTPStatus = HTTPStatus.OK) -> None:
        """The head and the content, or its beginning: where the connection is closed is the end."""
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Leaves the terminal alone."""


def _parse(body: bytes) -> dict[str, str]:
    """The texts of a request.

    Raises:
        ValueError: for a body that is not what the page sends.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"body must be JSON, got {error}") from error
    known = isinstance(found, dict) and {"text"} <= set(found) <= {"text", "compare"}
    if not known or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("body must be an object with the strings text and, if wanted, compare, got something else")
    for name, text in found.items():
        if half := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{name} must be Unicode text, got half of a surrogate pair at character {half.start()}")
    return found
