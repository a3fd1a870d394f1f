# SPDX-License-Identifier: MIT
"""The command line: ``--plugin flashvid`` and its options, folded into vLLM's own at parse time."""

import argparse
import json
from collections.abc import Callable
from typing import Any, get_args

from ..core.config import AUTO, FASTV, FLASHVID_SETTINGS, FlashVidConfig, Method, shown
from ..core.settings import KEY, REQUEST_OVERRIDES, SERVER_SINGLE, check_server
from .config_file import FLAG, refuse_unread_file

# vLLM recomputes M-RoPE positions of pruned videos only while its own pruning rate is above 0.
# Our budgets never read it, so one recognisable value serves every ratio. Can go when vLLM asks whoever prunes.
PRUNING_ON = 1e-6

_OPTIONS = (*(f"flashvid_{name}" for name in SERVER_SINGLE), "flashvid_config")


def add_options(parser: argparse.ArgumentParser, unsupported: str | None) -> None:
    """Add our options to ``parser``; they are folded into the namespace after it has parsed.

    Args:
        parser: any parser to which vLLM adds its engine arguments.
        unsupported: why the options must refuse, or None.
    """
    group = parser.add_argument_group(
        "FlashVID", "Video token compression (flashvid-vllm). Per request: mm_processor_kwargs.flashvid."
    )
    group.add_argument("--plugin", choices=[KEY], help="Compress videos with FlashVID.")
    group.add_argument(
        "--flashvid-retention-ratio",
        type=number(float),
        metavar="R",
        help="Share of a video's visual tokens to keep, in (0, 1]. Default: 0.25.",
    )
    group.add_argument(
        "--flashvid-token-budget",
        type=number(int),
        metavar="B",
        help="Most visual tokens to keep of a video, whatever its length; instead of the ratio.",
    )
    group.add_argument(
        "--flashvid-method",
        metavar="METHOD",
        help=f"How tokens are chosen: {', '.join(get_args(Method))}, {FASTV}. Default: flashvid.",
    )
    group.add_argument(
        "--flashvid-max-video-tokens",
        type=number(int),
        metavar="N",
        help="Most visual tokens of a video before compression; larger ones are refused. Default: 65536, or as many "
        "as 1 GiB of the model's features, or --max-num-batched-tokens if that is more.",
    )
    group.add_argument(
        "--flashvid-encoder-ratio",
        type=number(float, AUTO),
        metavar="F",
        help="Share of a video's patches that the vision encoder computes, in (0, 1]; the others are copies of what is "
        f"at the same place in another frame. Or {AUTO}: as few as leave little of the video unexplained. Default: 1.",
    )
    example = {name: getattr(FlashVidConfig, name) for name in FLASHVID_SETTINGS[:2]}
    group.add_argument(
        "--flashvid-config",
        type=json_object,
        action=_Merge,
        metavar="JSON",
        help=f"Further settings, such as '{json.dumps(example)}'. Given again, the later one adds.",
    )
    group.add_argument(
        f"--{FLAG}",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Whether a request may change the settings for itself. Default: it may.",
    )
    parse_known_args = parser.parse_known_args

    def parse_and_fold(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse_known_args(*args, **kwargs)
        try:
            fold(namespace, unsupported)
        except ValueError as error:
            parser.error(str(error))
        return namespace, rest

    # After the last option, whatever their order: an action of one option would not see the
    # others. Before anything else: API-server children rebuild their engine arguments from it.
    parser.parse_known_args = parse_and_fold  # type: ignore[method-assign]


def fold(namespace: argparse.Namespace, unsupported: str | None = None) -> None:
    """Move our options into ``mm_processor_kwargs`` and ``video_pruning_rate`` of ``namespace``.

    Raises:
        ValueError: a bad setting, an option without ``--plugin flashvid``, a clash with vLLM's
            own pruning, or an unsupported vLLM.
    """
    refuse_unread_file(getattr(namespace, "config", None))
    given = [name for name in _OPTIONS if getattr(namespace, name, None) is not None]
    if getattr(namespace, "plugin", None) is None:
        if given or getattr(namespace, "flashvid_request_overrides", None) is False:
            option = (given or [f"no-{FLAG}"])[0].replace("_", "-")
            raise ValueError(f"--{option} needs --plugin flashvid")
        return
    if unsupported is not None:
        raise ValueError(unsupported)
    other = dict(getattr(namespace, "mm_processor_kwargs", None) or {})
    if KEY in other:
        raise ValueError(
            f"--mm-processor-kwargs has a {KEY!r} of its own beside --plugin flashvid; use --flashvid-config instead"
        )
    if getattr(namespace, "video_pruning_rate", None):
        raise ValueError(
            f"--video-pruning-rate {namespace.video_pruning_rate} prunes videos too and excludes "
            "--plugin flashvid; leave one of them out"
        )
    settings = dict(namespace.flashvid_config or {})
    for name in SERVER_SINGLE:
        value = getattr(namespace, f"flashvid_{name}")
        if value is None:
            continue
        if name in settings:
            raise ValueError(
                f"--flashvid-{name.replace('_', '-')} {value} and --flashvid-config both give {name}; "
                "leave one of them out"
            )
        settings[name] = value
    if (overrides := namespace.flashvid_request_overrides) is not None:
        if settings.get(REQUEST_OVERRIDES, overrides) is not overrides:
            raise ValueError(
                f"--{'' if overrides else 'no-'}{FLAG} and --flashvid-config contradict each other about "
                f"{REQUEST_OVERRIDES}; leave one of them out"
            )
        if not overrides:
            settings[REQUEST_OVERRIDES] = False
    namespace.mm_processor_kwargs = {**other, KEY: check_server(settings)}
    namespace.video_pruning_rate = PRUNING_ON


class _Merge(argparse.Action):
    """Objects from a file, the command line and dotted arguments (which vLLM appends as one more) become one."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


def number(kind: Callable[[str], Any], word: str | None = None) -> Callable[[str], Any]:
    """An argparse type for ``int`` or ``float``, or a ``word`` instead, whose message says what was expected."""

    def parse(text: str) -> Any:
        if text == word:
            return word
        try:
            return kind(text)
        except ValueError:
            what = ("a whole number" if kind is int else "a number") + (f" or {word}" if word else "")
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None

    return parse


def json_object(text: str) -> dict[str, Any]:
    """An argparse type for a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {shown(text)} ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shown(text)}")
    return value
