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
from typing import Any

from torch import Tensor
from vllm.multimodal.cache import ShmObjectStoreSenderCache
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
# Of a video, where tokens are dropped inside the LLM: its visual tokens there, and how many are left, [2] int64
INNER = "flashvid_inner"
_OURS = (FIELD, FULL_EMBEDS, INNER)
_MARK = "-flashvid-"


def add_ours(
    item: MultiModalKwargsItem | None, row: Tensor, full_embeds: int, inner: Tensor | None = None
) -> MultiModalKwargsItem:
    """A processed video, or what vLLM sends for one that the receiver has (None, an address), with its settings and the
    embeddings that it has before compression, and what is dropped of it inside the LLM: a new item that shares the
    tensors."""
    ours = {
        FIELD: MultiModalFieldElem(data=row, field=MultiModalBatchedField(keep_on_cpu=True)),
        FULL_EMBEDS: MultiModalFieldElem(data=full_embeds, field=MultiModalBatchedField(keep_on_cpu=True)),
    }
    if inner is not None:
        ours[INNER] = MultiModalFieldElem(data=inner, field=MultiModalBatchedField(keep_on_cpu=True))
    return MultiModalKwargsItem({**(item or {}), **ours})


def name_of(video: str, settings: bytes) -> str:
    """What a video with these settings is called in the caches behind the encoder, from vLLM's hash of the video."""
    return f"{video}{_MARK}{hashlib.sha256(settings).hexdigest()}"


def video_of(name: str) -> str:
    """The inverse of `name_of`: vLLM's hash of the video. A name that has no settings is one."""
    video, mark, _ = name.rpartition(_MARK)
    return video if mark else name


def known_updates(cache: Any, name: str) -> Any:
    """The prompt updates that a sender's cache has beside an item, looked at only.

    Taking the item counts: as a use, which the receiver has to see in the same order, and in shared memory as one that
    a reader will acknowledge; until then the item is not freed.
    """
    if isinstance(cache, ShmObjectStoreSenderCache):
        return cache._p0_cache[name]
    return cache._cache.cache[name].prompt_updates


@contextmanager
def ours_apart(features: Sequence[MultiModalFeatureSpec]) -> Iterator[None]:
    """Inside, a request's ``features`` are without what is ours, as the caches of processed videos have them.

    What was found for a feature meanwhile gets it back.
    """
    apart = []
    for feature in features:
        if feature.data is None or FIELD not in feature.data:
            continue
        ours = {key: elem for key, elem in feature.data.items() if key in _OURS}
        apart.append((feature, feature.mm_hash, ours))
        bare = MultiModalKwargsItem({key: elem for key, elem in feature.data.items() if key not in _OURS})
        feature.mm_hash, feature.data = video_of(feature.mm_hash or feature.identifier), bare or None
    try:
        yield
    finally:
        for feature, mm_hash, ours in apart:
            feature.mm_hash, feature.data = mm_hash, MultiModalKwargsItem({**(feature.data or {}), **ours})
