# SPDX-License-Identifier: MIT
"""What the commands that ask an OpenAI server have in common."""

import base64
import json
from ipaddress import ip_address
from urllib.parse import urlsplit


def host_of(url: str) -> str | None:
    """The host that a URL names; None if no request could go there. Needs httpx."""
    import httpx

    try:
        parts, _ = urlsplit(url), httpx.URL(url)
        host = parts.hostname or ""
        valid = parts.scheme in ("http", "https") and host and host.encode("idna") and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # brackets, a port beyond 65535, a name that no DNS can hold
        return None
    return host if valid else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``; a proxy is for other machines."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def data_url(kind: str, content: bytes) -> str:
    """Bytes of the media type ``kind`` in a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message_of(body: bytes | str, most: int = 2000) -> str:
    """What an error's body says, however it is wrapped, in at most so many characters."""
    text = (body if isinstance(body, str) else body.decode(errors="replace")).strip()
    try:
        found = json.loads(text)
    except ValueError:
        return text[:most]
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), str(found))
    return str(found)[:most]
