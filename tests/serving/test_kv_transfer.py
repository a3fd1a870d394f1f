# SPDX-License-Identifier: MIT
"""KV that engines share: never between different settings, nor through connectors that cannot tell videos apart."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from flashvid_vllm.serving.refusals import refuse_shared_kv

from ..support.engine import VIDEO, Clip, engine, greedy, prepare_process, prompt_of, same
from ..support.families import LLAVA_ONEVISION

TEXT = f"<|im_start|>user\n{VIDEO}Describe the video.<|im_end|>\n<|im_start|>assistant\n"
BLOCK = 32


def transfer(name: str, **extra: Any) -> Any:
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)


@pytest.mark.parametrize("name", ["HF3FSKVConnector", "LMCacheMPConnector", "FlexKVConnectorV1"])
def test_connectors_that_know_kv_by_token_ids_are_refused(name: str) -> None:
    """All videos have the same ids, and under one budget the same number of them."""
    with pytest.raises(ValueError, match=rf"does not work with the KV connector {name}.*token ids"):
        refuse_shared_kv(transfer(name))
    nested = transfer("MultiConnector", connectors=[{"kv_connector": "NixlConnector"}, {"kv_connector": name}])
    with pytest.raises(ValueError, match=name):
        refuse_shared_kv(nested)


@pytest.mark.parametrize("name", ["ExampleConnector", "NixlConnector", "OffloadingConnector", "LMCacheConnectorV1"])
def test_others_are_not(name: str) -> None:
    refuse_shared_kv(None)
    refuse_shared_kv(transfer(name))
    refuse_shared_kv(transfer("MultiConnector", connectors=[{"kv_connector": name}]))


@pytest.mark.parametrize("module", ["hf3fs.hf3fs_connector", "lmcache_mp_connector"])
def test_vllms_connectors_that_are_refused_still_look_at_ids_alone(module: str) -> None:
    """Can go from the list when this fails."""
    found = importlib.util.find_spec(f"vllm.distributed.kv_transfer.kv_connector.v1.{module}")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text()
    assert "token_ids" in source
    assert not [name for name in ("mm_feature", "mm_hash", "identifier") if name in source]


def processor_of(directory: Path, **settings: Any) -> Any:
    """The multimodal processor of a model's engine with FlashVID's settings; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from flashvid_vllm import engine_args

    prepare_process()
    config = EngineArgs(str(directory), **engine_args(**settings)).create_engine_config().model_config
    return MULTIMODAL_REGISTRY.create_processor(config)


def test_positions_tell_videos_apart(models: Any) -> None:
    """LLaVA's KV of the same tokens at other positions is other KV: engines that share it (or move it) must not mix."""
    directory, hashes = models(LLAVA_ONEVISION), []
    for settings in ({}, {"positions": "consecutive"}, {"positions": "original"}):
        processor, video = processor_of(directory, retention_ratio=0.3, **settings), Clip(8, 98, 98)
        items = processor.info.parse_mm_data({"video": [(video.frames(), video.metadata())]})
        hashes.append([hash_of(processor, items, each) for each in (None, {"enabled": False})])
    by_default, consecutive, original = hashes
    assert by_default == consecutive
    assert by_default[0] != original[0]
    assert by_default[1] == original[1]  # left as it is, where it is


def hash_of(processor: Any, items: Any, flashvid: dict[str, Any] | None) -> str:
    """What caches behind the encoder know a video by."""
    kwargs = {} if flashvid is None else {"flashvid": flashvid}
    made = processor(f"{LLAVA_ONEVISION.video}What?", items, hf_processor_mm_kwargs=kwargs)
    return str(made["mm_hashes"]["video"][0])


@pytest.mark.slow
@pytest.mark.longer("three engines")
def test_a_shared_folder_gives_what_one_engine_gives(sharp_model: Path, tmp_path: Path) -> None:
    """Videos, ratios and methods that have one prompt to the token: each is found again, and none for another."""
    from flashvid_vllm import engine_args

    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    kept = 57
    settings: list[dict[str, Any]] = [{"token_budget": kept}, {"token_budget": kept, "alpha": 0.1}]
    settings += [{"token_budget": kept, "method": method} for method in ("uniform", "vidcom2")]
    settings += [{"retention_ratio": 1}, {"enabled": False}]
    prompts = [prompt_of(TEXT, [Clip(16, 112, 168, seed=s)], flashvid=each) for s in (0, 9) for each in settings]
    answers = []
    for shared in (False, True, True):
        options = {"kv_transfer_config": connector} if shared else {}
        with engine(sharp_model, **engine_args(retention_ratio=0.3), block_size=BLOCK, **options) as llm:
            answers.append([greedy(llm, [prompt])[0] for prompt in prompts])
    alone, stored, loaded = answers
    for one, two, three in zip(alone, stored, loaded, strict=True):
        length = len(one.prompt_token_ids)
        assert two.num_cached_tokens == 0
        assert three.num_cached_tokens == (length - 2) // BLOCK * BLOCK > 0
        for other in (two, three):
            same(one, other, 2e-5)
