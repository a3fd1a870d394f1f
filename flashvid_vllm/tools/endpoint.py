# SPDX-License-Identifier: MIT
"""What the commands that ask an OpenAI server have in common."""

import base64
from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``; a proxy is for other machines."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def data_url(kind: str, content: bytes) -> str:
    """Bytes of the media type ``kind`` in a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
