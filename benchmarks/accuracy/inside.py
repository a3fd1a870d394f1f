# SPDX-License-Identifier: MIT
"""lmms-eval with a chat model that sends true videos and watches the token counts. Runs in lmms-eval's environment.

lmms-eval's own `openai` model can send `video_url`s, but adds `media_io_kwargs`, which vLLM answers with HTTP 400
unless it is told to trust its clients, and scores a request that failed as a wrong answer. Its `vllm` model sends
frames as images. So this one builds the messages as `openai` does, and sends them itself.

    FLASHVID_ACCURACY='{"base_url": ...}' python -m benchmarks.accuracy.inside --model flashvid_chat --tasks ...
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from lmms_eval.models import MODEL_REGISTRY_V2  # type: ignore[import-not-found]
from lmms_eval.models.chat.openai import OpenAICompatible  # type: ignore[import-not-found]
from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

from benchmarks.accuracy.chat import GuardedCompletions
from benchmarks.accuracy.guard import GuardAbort

NAME = "flashvid_chat"
OPTIONS = "FLASHVID_ACCURACY"  # JSON; --model_args takes no commas
ABORTED = 3  # exit code


class GuardedChat(OpenAICompatible):
    """lmms-eval's `openai` model with GuardedCompletions for a client; `frames` is only for lmms-eval's records."""

    def __init__(
        self, model: str, method: str = "flashvid", retention_ratio: float | None = None, frames: int = 0, **kwargs: Any
    ) -> None:
        options = json.loads(os.environ[OPTIONS])
        super().__init__(
            model=options["model"], base_url=options["base_url"], api_key="none", pass_video_url=True, max_retries=1,
            num_concurrent=options["concurrency"], httpx_trust_env=False, **kwargs,
        )  # fmt: skip
        guarded = GuardedCompletions(retention_ratio, method, options)
        self.client = SimpleNamespace(chat=SimpleNamespace(completions=guarded))


def main() -> int:
    """lmms-eval's command line, with one more model."""
    from lmms_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, chat_class_path=f"{GuardedChat.__module__}.GuardedChat"))
    try:
        cli_evaluate()
    except GuardAbort as abort:
        print(f"the guard ended the run: {abort}", file=sys.stderr, flush=True)
        return ABORTED
    return 0


if __name__ == "__main__":
    # by its name: a class of `__main__` is another one than lmms-eval would import
    from benchmarks.accuracy import inside

    sys.exit(inside.main())
