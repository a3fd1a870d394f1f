# SPDX-License-Identifier: MIT
"""Whether a server can be tuned: told before a single video is sent."""

from collections.abc import Sequence

from ..errors import UserError
from .client import Client, Failed
from .grid import Setting, plain

_NO_SUCH_RATIO = {"retention_ratio": 2}  # which the plugin refuses by name


def probe(client: Client, settings: Sequence[Setting]) -> None:
    """Raise UserError, with the remedy, unless the server runs the plugin and takes every setting from a request.

    A few questions of one word: a server without the plugin refuses any ``mm_processor_kwargs``, or takes even those
    that make no sense; one that allows no settings says so.
    """
    try:
        client.check(plain().request)
    except Failed as error:
        raise UserError(_refused(str(error))) from None
    try:
        client.check(_NO_SUCH_RATIO)
    except Failed as error:
        if "retention_ratio" not in str(error):
            raise UserError(f"the server does not check settings as the plugin does: {error}") from None
    else:
        raise UserError(
            "the server takes any setting, even retention_ratio=2: it does not run the plugin. Start it with "
            "vllm serve MODEL --plugin flashvid"
        )
    for setting in settings:
        try:
            client.check(setting.request)
        except Failed as error:
            raise UserError(f"the server refuses {setting.name}: {error}") from None


def _refused(message: str) -> str:
    if "no-flashvid-request-overrides" in message:
        return (
            "the server was started with --no-flashvid-request-overrides: no request may choose its ratio there. Start "
            "one without it to tune, and close it again afterwards"
        )
    if "mm_processor_kwargs" in message or "trust-request-mm-kwargs" in message:
        return (
            f"the server does not run the plugin; start it with vllm serve MODEL --plugin flashvid (its message: "
            f"{message})"
        )
    return f"the server refuses a question of one word: {message}"
