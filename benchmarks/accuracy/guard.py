# SPDX-License-Identifier: MIT
"""Was the video compressed as asked? Answered by the server's own token counts, exactly.

A prompt with videos of V visual tokens in all takes `fixed + kept` tokens, and neither `fixed` (text, separators) nor
V is known beforehand. Two more requests with the same content give both, for every model family: at a budget of one
token a video the prompt takes `fixed + 1`, at a ratio of almost 1 it takes `fixed + V - 1`. Then a prompt at ratio R
must take `fixed + floor(R * V)`, to the token. Frames sent as images, a plugin that was not loaded, and settings that
do not arrive make the two requests equally long.

Standard library only: lmms-eval's environment imports this, too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LEAST: dict[str, Any] = {"token_budget": 1}
MOST: dict[str, Any] = {"retention_ratio": 0.999999}  # drops one token; a plain prompt may have other separators
CAUSES = (
    "probable causes: the frames were sent as images; the server runs without --plugin flashvid, or its vLLM could "
    "not load the plugin; something between here and the server drops mm_processor_kwargs"
)


class GuardAbort(BaseException):
    """The evaluation must not go on; the text says why.

    Not an Exception: lmms-eval turns those into wrong answers, and its command line into exit code 0.
    """


def settings_of(ratio: float | None, method: str) -> dict[str, Any]:
    """What a request says to the plugin; `ratio` None is the plain model."""
    return {"enabled": False} if ratio is None else {"retention_ratio": ratio, "method": method}


def kept_of(tokens: int, ratio: float) -> int:
    """Tokens that a video of `tokens` keeps at `ratio`: flashvid_vllm.core.budget.plan, for one video."""
    return max(1, math.floor(Fraction(repr(ratio)) * tokens))


@dataclass(frozen=True)
class Witness:
    """Prompt tokens of the same content with three settings.

    Attributes:
        asked: with the settings of the run.
        least: with LEAST.
        most: with MOST.
        videos: how many videos the content has.
    """

    asked: int
    least: int
    most: int
    videos: int = 1

    @property
    def video_tokens(self) -> int:
        """Visual tokens of the videos before compression, V."""
        return self.most - self.least + 2 * self.videos

    @property
    def kept(self) -> int:
        """Visual tokens that are left with the settings of the run."""
        return self.asked - self.least + self.videos

    def check(self, ratio: float | None) -> None:
        """Raise GuardAbort unless the videos were compressed to `ratio`, or left whole where it is None."""
        seen = (
            f"{self.asked} prompt tokens with the settings of the run, {self.least} when each video is to keep one "
            f"token, {self.most} when it is to keep all but one"
        )
        if self.most - self.least < self.videos:
            raise GuardAbort(f"the settings make no difference to the prompt: {seen}. {CAUSES}")
        if ratio is None:
            if self.kept < self.video_tokens:
                raise GuardAbort(
                    f"a plain prompt is shorter than it must be: {seen}, so {self.kept} of {self.video_tokens} visual "
                    "tokens are left and all were wanted; does the server refuse overrides, or drop frames?"
                )
            return
        high = kept_of(self.video_tokens, ratio)
        # each of several videos is rounded down for itself, and keeps a token at least
        if abs(self.kept - high) >= self.videos:
            raise GuardAbort(
                f"the videos were not compressed to {ratio:g}: {seen}, so {self.kept} of {self.video_tokens} visual "
                f"tokens are left and {high} were wanted; does another setting of the server win?"
            )


def examine(count: Callable[[Mapping[str, Any]], int], asked: int, ratio: float | None, videos: int = 1) -> Witness:
    """Ask the same content twice more by `count` (settings -> prompt tokens) and check it. Raises GuardAbort."""
    witness = Witness(asked, count(LEAST), count(MOST), videos)
    witness.check(ratio)
    return witness


def videos_in(messages: list[dict[str, Any]]) -> int:
    """The number of videos in OpenAI-style messages. Raises GuardAbort for images, or if there is no video."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    kinds = [part.get("type") for part in parts]
    if images := kinds.count("image_url"):
        raise GuardAbort(
            f"a request carries {images} images: this task hands frames over instead of a video's path, so no video "
            "would be compressed. Take a task whose doc_to_visual returns paths of videos"
        )
    if "video_url" not in kinds:
        raise GuardAbort(f"a request carries no video, only {', '.join(sorted(set(map(str, kinds)))) or 'text'}")
    return kinds.count("video_url")


def compare(plain: Mapping[str, int], kept: Mapping[str, int]) -> int:
    """Hold every request of a compressed run against the same one of the plain run (content -> prompt tokens).

    Returns how many were in both. Raises GuardAbort if one is not shorter.
    """
    both = plain.keys() & kept.keys()
    for content in sorted(both):
        if kept[content] >= plain[content]:
            raise GuardAbort(
                f"a request took {kept[content]} prompt tokens compressed and {plain[content]} plain; every one must "
                f"be shorter. {CAUSES}"
            )
    return len(both)
