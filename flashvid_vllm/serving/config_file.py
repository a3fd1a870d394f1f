# SPDX-License-Identifier: MIT
"""Our options in a ``vllm serve --config FILE``: what vLLM's reader would drop without a word is obeyed or refused.

vLLM turns the file into arguments: ``key: value`` into ``--key value``, ``key: true`` into ``--key``. An option whose
value is false it leaves out (it looks for ``--no-key`` among the options of ``vllm``, where those of ``vllm serve`` are
not), and so it does with an empty list.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.settings import KEY, SERVER_SINGLE

FLAG = f"{KEY}-request-overrides"
_SETTINGS = f"{KEY}-config"
_VALUED = ("plugin", *(f"{KEY}-{name.replace('_', '-')}" for name in SERVER_SINGLE), _SETTINGS)


def lost_arguments(content: Any, path: str) -> list[str]:
    """Arguments for those of our options that vLLM leaves out, to stand behind those that it makes of the file.

    Args:
        content: of the file, as YAML gives it.
        path: of the file, for messages.

    Raises:
        ValueError: one of our options twice or with a value that it cannot have, or something that is left out
            and looks like one of them.
    """
    lost, seen = [], set()
    for key, value in content.items() if isinstance(content, Mapping) else ():
        option, where = _option(key), f"{path} has {key}: {json.dumps(value, default=str)}"
        name = option.removeprefix("no-")
        if name in seen:
            raise ValueError(f"{where}, but sets --{name} before; leave one of them out")
        if name == FLAG:
            if not isinstance(value, bool):
                raise ValueError(f"{where}; expected true or false, without quotes")
            if not value:
                lost.append(f"--{name}" if option != name else f"--no-{name}")
        elif option in _VALUED:
            kinds = (str, Mapping) if option == _SETTINGS else (str, int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                expected = {"plugin": KEY, _SETTINGS: "settings such as {alpha: 0.7}"}.get(option, "one value")
                raise ValueError(f"{where}; expected {expected}, or leave it out")
        elif option.partition(".")[0] in _VALUED:
            raise ValueError(f"{where}; in a file, write it below {option.partition('.')[0]}")
        elif value in (False, [], None) and _looks_like_ours(name):
            raise ValueError(f"{where}, which is no option; FlashVID's are {', '.join((*_VALUED, FLAG))}")
        seen |= {name} & {FLAG, *_VALUED}
    return lost


def refuse_unread_file(path: Any) -> None:
    """ValueError for a file with our options that vLLM has not read.

    It reads ``--config FILE`` and takes it out of the arguments; ``--config=FILE`` it leaves there, and never reads.
    """
    if not isinstance(path, str) or not Path(path).is_file():
        return
    import yaml

    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for key in content if isinstance(content, Mapping) else ():
        option = _option(key)
        if option.partition(".")[0] in _VALUED or _looks_like_ours(option.removeprefix("no-")):
            raise ValueError(
                f"vLLM does not read --config={path}, which has {key}; write --config {path}, with a space"
            )


def _option(key: Any) -> str:
    """The option that a key stands for: underscores are dashes, up to the first dot."""
    name, dot, rest = str(key).partition(".")
    return name.replace("_", "-") + dot + rest


def _looks_like_ours(name: str) -> bool:
    return name.startswith(KEY) or bool(difflib.get_close_matches(name, (FLAG, *_VALUED[1:]), cutoff=0.8))
