"""Serve the page to this machine alone: 127.0.0.1, one token, one origin, JSON in and out."""

from __future__ import annotations

import http.server
import json
import secrets
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kedit.cli.ui.session import BusyError
from kedit.errors import ConfigError, KEditError
from kedit.utils.progress import logger

if TYPE_CHECKING:
    from kedit.cli.ui.session import Session

HOST = "127.0.0.1"
HEADER = "X-Kedit-Token"
MOST = 1 << 16  # bytes of a request


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server for one session.

    Attributes:
        session: what it serves.
        token: without it nothing is answered.
        address: of the page, with the token.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, session: Session, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(f"Port {port} of {HOST} cannot be used ({error}). Give another --port, or 0.") from error
        self.session = session
        self.token = secrets.token_urlsafe(24)
        own = self.server_address[1]
        self.hosts = {f"{name}:{own}" for name in (HOST, "localhost")}
        self.address = f"http://{HOST}:{own}/?token={self.token}"

    def is_token(self, given: str | None) -> bool:
        """Compare a token without telling by the time how much of it is right."""
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: the page by GET, everything else by POST with JSON."""

    server: Server
    timeout = 30
    server_version, sys_version = "kedit", ""

    def do_GET(self) -> None:
        """Send the page."""
        url = urllib.parse.urlsplit(self.path)
        given = urllib.parse.parse_qs(url.query).get("token", [None])[0]
        if self._is_foreign():
            return
        if url.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "There is only one page.")
        elif not self.server.is_token(given):
            self._refuse(HTTPStatus.FORBIDDEN, "Open the address that kedit ui printed; it holds a token.")
        else:
            nonce = secrets.token_urlsafe(16)
            page = files("kedit.cli.ui").joinpath("page.html").read_text(encoding="utf-8")
            page = page.replace("@NONCE@", nonce).replace("@TOKEN@", self.server.token).replace("@HEADER@", HEADER)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        """Do what is asked, for the page alone."""
        if self._is_foreign():
            return
        if not self.server.is_token(self.headers.get(HEADER)):
            return self._refuse(HTTPStatus.FORBIDDEN, "The token is missing or wrong. Open the page anew.")
        length, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if kind != "application/json" or not length.isdecimal() or int(length) > MOST:
            return self._refuse(HTTPStatus.BAD_REQUEST, f"A request is JSON of up to {MOST} bytes.")
        try:
            asked = json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError):
            asked = None
        action = _ACTIONS.get(self.path)
        if not isinstance(asked, dict) or action is None:
            return self._refuse(HTTPStatus.BAD_REQUEST, "The request is not one of this page.")
        try:
            answer = action(self.server.session, asked)
        except BusyError as error:
            return self._refuse(HTTPStatus.CONFLICT, str(error))
        except KEditError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception:
            logger.exception("The request %s failed.", self.path)
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "This failed; the terminal says why.")
        if isinstance(answer, bytes):
            named = {"Content-Disposition": 'attachment; filename="edit.safetensors"'}
            return self._send(HTTPStatus.OK, answer, "application/octet-stream", named)
        return self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _is_foreign(self) -> bool:
        """Refuse what another site's page sends: by a name of its own for this machine, or from its own origin."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        own = self.headers.get("Host") in hosts and self.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin")
        if own and (origin is None or origin in {f"http://{host}" for host in hosts}):
            return False
        self._refuse(HTTPStatus.FORBIDDEN, "Only the page itself may ask.")
        return True

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._send(status, json.dumps({"error": text}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in {**fixed, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: addresses hold the token."""


_ACTIONS: dict[str, Callable[[Session, dict[str, Any]], dict[str, Any] | bytes]] = {
    "/state": lambda session, _: session.state(),
    "/load": lambda session, asked: session.load(str(asked.get("name") or "").strip() or None),
    "/edit": lambda session, asked: session.edit(asked),
    "/progress": lambda session, _: session.progress(),
    "/cancel": lambda session, _: session.cancel(),
    "/keep": lambda session, _: session.keep(),
    "/undo": lambda session, asked: session.undo(asked.get("number")),
    "/ask": lambda session, asked: session.ask(asked.get("prompt") or "", chat=asked.get("chat") is True),
    "/patch": lambda session, _: session.patch(),
}
