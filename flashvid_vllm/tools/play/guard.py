# SPDX-License-Identifier: MIT
"""Who may talk to the local server, and what a browser may do with what it gets.

A page of another site can send requests to 127.0.0.1 (cross-site requests), or be served under a name of its own that
resolves to 127.0.0.1 (DNS rebinding) and then read the answers. The first carries another site's Origin, the second
another site's Host; both are refused.
"""

from collections.abc import Collection
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..endpoint import is_loopback

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Nothing from elsewhere, no inline code, and no assignment to innerHTML or its like (Trusted Types).
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
# viz's page is one file with its code inside: it runs, but as nobody, without a way to this server.
KEPT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)
HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware: refuses foreign requests with 403, adds HEADERS to every answer that has none of its own.

    Args:
        app: what is guarded.
        host: the address that the server is bound to.
        names: further host names under which it may be reached.
    """

    def __init__(self, app: "ASGIApp", host: str, names: Collection[str] = ()) -> None:
        self.app = app
        self.names = {name.lower() for name in (host, *names)} | {"localhost"}
        self.loopback = is_loopback(host)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        why = self.refusal(Headers(scope=scope))
        answer = self.app if why is None else JSONResponse({"error": why}, status_code=403)
        await answer(scope, receive, send_with_headers)

    def refusal(self, headers: "Headers") -> str | None:
        """Why a request with these headers is refused, or None."""
        host = headers.get("host", "")
        if not self._is_ours(hostname(f"//{host}")):
            return (
                f"this server is not {host!r}: open it under the address that flashvid play printed, "
                "or start it with --allow-host NAME if that name is yours"
            )
        origin = headers.get("origin")
        if origin is not None and netloc(origin) != host.lower():
            return f"a page of {origin!r} may not use this server"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "a page of another site may not use this server"
        return None

    def _is_ours(self, name: str) -> bool:
        """Whether ``name`` is one of ours. A rebound name is never an address, so any address will do."""
        if name in self.names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback


def netloc(url: str) -> str | None:
    """The lower-case host and port of a URL, None if it is malformed."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None


def hostname(url: str) -> str:
    """The lower-case host of a URL, empty if it has none or is malformed."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
