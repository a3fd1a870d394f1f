# SPDX-License-Identifier: MIT
"""vLLM's processor caches hold a video's pixels once, whatever settings ask for it, and never mix settings up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Lock
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

pytest.importorskip("vllm")

from flashvid_vllm import engine_args
from flashvid_vllm.core.settings import KEY, MAX_VIDEO_TOKENS
from flashvid_vllm.models.processor_cache import FIELD
from flashvid_vllm.models.settings_row import unpack_settings

from ..support.engine import VIDEO, Clip, greedy, prompt_of, tokens_and_logprobs
from ..support.families import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, Family

FAMILIES = [QWEN3_VL, LLAVA_ONEVISION]
KINDS = ("lru", "processor_only", "shm")
CLIP, OTHER = Clip(8, 64, 96), Clip(8, 64, 96, seed=3)
SETTINGS: list[dict[str, Any]] = [
    {"retention_ratio": 0.2}, {"retention_ratio": 0.5}, {"token_budget": 9}, {"enabled": False},
    {"retention_ratio": 0.2, "alpha": 0.1}, {"retention_ratio": 1},
]  # fmt: skip


class Pipe:
    """A processor and, as vLLM has them in different processes, both ends of its cache."""

    def __init__(self, family: Family, model: Path, kind: str, gigabytes: float = 0.0625) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.multimodal.cache import (
            engine_receiver_cache_from_config,
            processor_cache_from_config,
            worker_receiver_cache_from_config,
        )

        options: dict[str, Any] = {"mm_processor_cache_gb": 0 if kind == "none" else gigabytes}
        if kind == "shm":
            options |= {"mm_processor_cache_type": "shm", "mm_shm_cache_max_object_size_mb": 8}
        if kind == "processor_only":  # as with several API servers
            options |= {"_api_process_count": 2, "_api_process_rank": 0}
        flashvid = engine_args(retention_ratio=0.3)
        config = EngineArgs(str(model), dtype="float32", **flashvid, **options).create_engine_config()
        self.family = family
        self.processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        self.sender = processor_cache_from_config(config)
        receivers = [engine_receiver_cache_from_config(config), worker_receiver_cache_from_config(config, Lock())]
        self.receivers = [receiver for receiver in receivers if receiver is not None]

    def send(
        self,
        clips: list[Clip],
        settings: dict[str, Any],
        uuids: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[list[int], list[Any]]:
        """Ids of a prompt of ``clips``, and its features as the worker gets them."""
        from vllm.multimodal.inputs import MultiModalFeatureSpec
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        with_metadata = self.processor.data_parser.video_needs_metadata
        videos = [(clip.frames(), clip.metadata()) if with_metadata else clip.frames() for clip in clips]
        made = self.processor(
            self.family.video * len(clips),
            self.processor.info.parse_mm_data({"video": videos}),
            {"video": uuids} if uuids else None,
            {**kwargs, KEY: settings},
            self.sender,
        )
        parts = (made[f"mm_{part}"]["video"] for part in ("kwargs", "hashes", "placeholders"))
        sent = [
            MultiModalFeatureSpec(item, "video", name, where, name) for item, name, where in zip(*parts, strict=True)
        ]
        features = MsgpackDecoder(list[MultiModalFeatureSpec]).decode(MsgpackEncoder().encode(sent))
        for receiver in self.receivers:
            receiver.get_and_update_features(features)
        return made["prompt_token_ids"], features

    def held(self) -> tuple[int, int]:
        """Entries, and bytes of different tensors, in the cache that holds tensors."""
        cache = (*self.receivers, self.sender)[0]
        if not hasattr(cache, "_cache"):
            ring = self.sender._shm_cache.ring_buffer
            return len(self.sender._shm_cache.key_index), ring.data_buffer_end - ring.data_buffer_start
        items = [getattr(value, "item", value) for value in cache._cache.values()]
        tensors = {
            elem.data.untyped_storage().data_ptr(): elem.data.untyped_storage().nbytes()
            for item in items
            for elem in item.values()
            if isinstance(elem.data, torch.Tensor)
        }
        return len(items), sum(tensors.values())

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()


def same(features: list[Any], expected: list[Any]) -> None:
    """That features are the same, tensor by tensor."""
    assert [feature.identifier for feature in features] == [feature.identifier for feature in expected]
    assert [feature.mm_hash for feature in features] == [feature.mm_hash for feature in expected]
    for feature, other in zip(features, expected, strict=True):
        assert feature.mm_position == other.mm_position
        assert feature.data == other.data


def use_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory beside that of an engine in this process, after which vLLM reads its environment no more."""
    from vllm import envs

    monkeypatch.setitem(vars(envs), "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME", uuid4().hex)


@contextmanager
def cached_and_not(
    family: Family, directory: Path, kind: str, patch: pytest.MonkeyPatch
) -> Iterator[tuple[Pipe, Pipe]]:
    """With a cache of this kind, and without."""
    use_own_memory(patch)
    pipe = Pipe(family, directory, kind)
    yield pipe, Pipe(family, directory, "none")
    pipe.close()


def sent_alike(pipes: tuple[Pipe, Pipe], clips: list[Clip], settings: dict[str, Any]) -> list[Any]:
    """The features of clips from the pipe with a cache, which must be those of the other."""
    (ids, features), (expected_ids, expected) = (pipe.send(clips, settings) for pipe in pipes)
    assert ids == expected_ids
    same(features, expected)
    return features


@pytest.fixture(params=[(f, k) for f in FAMILIES for k in KINDS], ids=lambda param: f"{param[0].name}-{param[1]}")
def pipes(
    request: pytest.FixtureRequest, models: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Pipe, Pipe]]:
    family, kind = request.param
    with cached_and_not(family, models(family), kind, monkeypatch) as both:
        yield both


def test_one_copy_of_the_pixels_for_all_settings(pipes: tuple[Pipe, Pipe]) -> None:
    """Each of them had its own."""
    cached, _ = pipes
    held, names = set(), set()
    for settings in SETTINGS * 2:
        (feature,) = sent_alike(pipes, [CLIP], settings)
        held.add(cached.held())
        names.add(feature.identifier)
    assert len(names) == len(SETTINGS)
    ((entries, size),) = held
    assert entries == 1
    cached.send([OTHER, CLIP], SETTINGS[0])
    entries, both = cached.held()
    assert entries == 2
    assert 1.9 * size < both < 2.1 * size


def test_hits_among_several_videos(pipes: tuple[Pipe, Pipe]) -> None:
    for clips in ([CLIP], [OTHER, CLIP], [CLIP, CLIP], [CLIP, OTHER]):
        for settings in ({"retention_ratio": 0.2 + 0.1 * len(clips)}, {"enabled": False}):
            sent_alike(pipes, clips, settings)


def test_a_uuid_names_pixels_and_not_settings(pipes: tuple[Pipe, Pipe]) -> None:
    """The same uuid with other settings never is the same video behind the encoder."""
    cached, _ = pipes
    seen = {}
    for settings in SETTINGS:
        _, (feature,) = cached.send([CLIP], settings, ["mine"])
        seen[feature.identifier] = unpack_settings(feature.data[FIELD].data)
    assert len(seen) == len(set(seen.values())) == len(SETTINGS)
    assert cached.held()[0] == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_both_ends_forget_the_same(family: Family, models: Callable[[Any], Path]) -> None:
    """A sender that believes the receiver to have what it has forgotten would refuse the request."""
    from vllm.multimodal.cache import MultiModalCacheMissError

    pipe = Pipe(family, models(family), "lru", 0.003)
    (receiver,) = pipe.receivers
    clips = [Clip(8, 64, 96, seed=seed) for seed in (0, 1, 2, 0, 3, 4, 0, 2, 5, 1)] * 3
    for i, clip in enumerate(clips):
        pipe.send([clip], SETTINGS[i % 4])
        assert list(pipe.sender._cache) == list(receiver._cache)
        assert pipe.sender._cache.currsize == receiver._cache.currsize
    receiver.clear_cache()
    with pytest.raises(MultiModalCacheMissError) as missed:
        pipe.send([CLIP], SETTINGS[0], ["mine"]), pipe.send([clips[-1]], SETTINGS[0])
    for name in missed.value.mm_hashes:  # as vLLM does before it asks for the video again
        pipe.sender.invalidate(name)
    pipe.send([clips[-1]], SETTINGS[1])


def test_what_settings_refuse_they_refuse_in_the_cache_too(models: Callable[[Any], Path]) -> None:
    """And what was refused is in neither end: a sender that has it would not send it again."""
    pipe = Pipe(QWEN2_5_VL, models(QWEN2_5_VL), "lru")
    (receiver,) = pipe.receivers
    pipe.processor.info.flashvid_server[MAX_VIDEO_TOKENS] = 20
    odd, large = Clip(8, 56, 56, seconds_per_frame=1e9), Clip(8, 112, 112)
    for clip, message in ((odd, "mend its fps or frame times"), (large, "this server takes 20")):
        held = list(pipe.sender._cache)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                pipe.send([clip], {"retention_ratio": 0.5})
        assert list(pipe.sender._cache) == list(receiver._cache) == held
        pipe.send([clip], {"enabled": False})
        with pytest.raises(ValueError, match=message):
            pipe.send([clip], {"retention_ratio": 0.5})


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_sent_counts_as_used(
    kind: str, models: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video in shared memory is freed when it was read as often as it was taken; to look at its size took it too,
    so that after a hit its place was never free again."""
    use_own_memory(monkeypatch)
    pipe = Pipe(QWEN3_VL, models(QWEN3_VL), kind)
    pipe.processor.info.flashvid_server[MAX_VIDEO_TOKENS] = 20
    for _ in range(3):
        pipe.send([CLIP], {"enabled": False})
        with pytest.raises(ValueError, match="this server takes 20"):
            pipe.send([CLIP], {"retention_ratio": 0.5})
    assert pipe.sender.make_stats().total == 3
    if kind == "shm":
        storage = pipe.sender._shm_cache
        ((address, item),) = storage.key_index.values()
        with storage.ring_buffer.access_buf(address) as (data, _):
            assert storage.default_is_free_check(item, data)
    pipe.close()


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_setting_for_each_video(kind: str, models: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM builds the kwargs anew for what its cache lacks. Ours were not among them: KeyError."""
    from vllm.multimodal.processing import context

    use_own_memory(monkeypatch)
    pipe, calls = Pipe(QWEN3_VL, models(QWEN3_VL), kind), []
    original = context.get_allowed_kwarg_only_overrides

    def watched(function: Any, kwargs: Any, **options: Any) -> Any:
        calls.append(str(kwargs))
        return original(function, kwargs, **options)

    monkeypatch.setattr(context, "get_allowed_kwarg_only_overrides", watched)
    frames = []
    for rates in ([1.0, 2.0], [2.0, 2.0], [2.0, 0.5]):  # of 4 seconds, and at least 4 frames
        for settings in ({"retention_ratio": 0.5}, {"enabled": False}):
            _, features = pipe.send([CLIP, OTHER], settings, fps=rates, do_sample_frames=True)
            frames.append([int(feature.data["video_grid_thw"].data[0]) for feature in features])
            assert all(FIELD in feature.data for feature in features)
    assert frames == [[2, 4], [2, 4], [4, 4], [4, 4], [4, 2], [4, 2]]
    assert calls
    assert not any(KEY in call for call in calls)
    pipe.close()


@pytest.mark.slow
def test_answers_do_not_depend_on_what_is_cached(models: Callable[[Any], Path], engines: Any) -> None:
    llm = engines(models(QWEN3_VL), {"retention_ratio": 0.3})
    prompts = [prompt_of(f"{VIDEO}What happens?", [CLIP], flashvid=settings) for settings in SETTINGS]
    core = llm.llm_engine.engine_core.engine_core

    def forget() -> None:
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()

    alone = []
    for prompt in prompts:
        forget()
        alone += greedy(llm, [prompt])
    forget()
    for batch in ([*greedy(llm, prompts[:1]), *greedy(llm, prompts[1:])], greedy(llm, prompts)):
        assert [tokens_and_logprobs(output)[0] for output in batch] == [tokens_and_logprobs(o)[0] for o in alone]
        assert len(core.mm_receiver_cache._cache) == 1
