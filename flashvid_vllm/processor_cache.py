# SPDX-License-Identifier: MIT
"""One copy of a video's pixels, whatever settings ask for it.

vLLM has one hash for three caches. Pixels depend on the video alone, so the caches of processed videos are asked for
the hash that vLLM makes of it; what is behind the encoder, embeddings and the KV cache's blocks, depends on the
settings, so there a video is named by that hash and a digest of them. The settings themselves are no part of what is
cached: they travel beside it, with each request.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
)

FIELD = "flashvid_settings"
# Embeddings of a video before compression. The scheduler has nothing else of one that lies in shared memory
# (--mm-processor-cache-type shm) but its address.
FULL_EMBEDS = "flashvid_full_embeds"
_MARK = "-flashvid-"


def add_settings(item: MultiModalKwargsItem | None, row: Tensor, full_embeds: int) -> MultiModalKwargsItem:
    """A processed video, or what vLLM sends for one that the receiver has (None, an address), with its settings and
    its embeddings before compression: a new item that shares the tensors."""
    settings = MultiModalFieldElem(row, MultiModalBatchedField(keep_on_cpu=True))
    embeds = MultiModalFieldElem(full_embeds, MultiModalBatchedField())
    return MultiModalKwargsItem({**(item or {}), FIELD: settings, FULL_EMBEDS: embeds})


def name_of(video: str, row: Tensor) -> str:
    """What a video with these settings is called in the caches behind the encoder, from vLLM's hash of the video."""
    return f"{video}{_MARK}{hashlib.sha256(row.numpy().tobytes()).hexdigest()}"


def video_of(name: str) -> str:
    """The inverse of `name_of`: vLLM's hash of the video. A name that has no settings is one."""
    video, mark, _ = name.rpartition(_MARK)
    return video if mark else name


@contextmanager
def settings_apart(features: Sequence[MultiModalFeatureSpec]) -> Iterator[None]:
    """Inside, a request's ``features`` are without settings, as the caches of processed videos have them.

    What was found for a feature meanwhile gets them back.
    """
    ours = [feature for feature in features if feature.data is not None and FIELD in feature.data]
    apart = []
    for feature in ours:
        bare = dict(feature.data or {})
        beside = {key: bare.pop(key) for key in (FIELD, FULL_EMBEDS) if key in bare}
        apart.append((feature, feature.mm_hash, beside))
        feature.mm_hash = video_of(feature.mm_hash or feature.identifier)
        feature.data = MultiModalKwargsItem(bare) if bare else None
    try:
        yield
    finally:
        for feature, mm_hash, beside in apart:
            feature.mm_hash, feature.data = mm_hash, MultiModalKwargsItem({**(feature.data or {}), **beside})
