# SPDX-License-Identifier: MIT
"""Starting an engine: what is refused before anything is loaded, and the one line that says what is on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from flashvid_vllm import FlashVidConfig, engine_args
from flashvid_vllm.models import FAMILIES
from flashvid_vllm.models.reuse import refuse_rows
from flashvid_vllm.serving import refusals

from ..support.engine import prepare_process


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare_process()


@pytest.fixture(scope="module")
def text_model(sharp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that FlashVID has nothing to do with: a text-only Qwen2."""
    from transformers import AutoTokenizer, Qwen2Config

    directory = tmp_path_factory.mktemp("text")
    config = Qwen2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=512)  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(sharp_model).save_pretrained(directory)
    return directory


def config_of(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), max_model_len=1024, **options).create_engine_config()


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as info:  # noqa: PT011 - the callers look at the message
        config_of(model, **options)
    return str(info.value)


def test_an_unsupported_model(text_model: Path) -> None:
    message = refusal(text_model, **engine_args(retention_ratio=0.1))
    assert "does not support Qwen2ForCausalLM" in message
    assert all(architecture in message for architecture in FAMILIES)
    assert "--plugin flashvid" in message


def test_other_pruning(sharp_model: Path) -> None:
    options = engine_args(retention_ratio=0.1) | {"video_pruning_rate": 0.5}
    assert "video_pruning_rate=0.5" in refusal(sharp_model, **options)


def test_cuda_graphs_of_the_encoder(sharp_model: Path) -> None:
    options = {"compilation_config": {"cudagraph_mm_encoder": True}}
    assert "compilation_config.cudagraph_mm_encoder" in refusal(sharp_model, **engine_args(), **options)


def test_single_rows_of_a_compiled_encoder(sharp_model: Path) -> None:
    """Of a server that does not ask for them a request is told the same: in the engine it would be everybody's end."""
    options = {"compilation_config": {"compile_mm_encoder": True}}
    said = refusal(sharp_model, **engine_args(encoder_ratio=0.5), **options)
    assert "encoder_ratio=0.5: this server's vision encoder cannot compute some" in said
    assert "its blocks are compiled" in said
    with pytest.raises(ValueError, match=r"'auto': .*its blocks"):
        refuse_rows("its blocks", FlashVidConfig(encoder_ratio="auto"))
    refuse_rows("its blocks", FlashVidConfig(encoder_ratio=0.5, encoder_reuse="frames"))
    refuse_rows("its blocks", FlashVidConfig())
    refuse_rows(None, FlashVidConfig(encoder_ratio=0.5))


@pytest.mark.parametrize("other", [{"v2": True}, {"drafts": None}, {"asynchronous": False}, {"mrope": False}])
def test_positions_that_drift_behind_a_rejected_draft(other: dict[str, Any]) -> None:
    """A CPU schedules nothing asynchronously, so by the configuration alone."""

    def config(v2: bool = False, drafts: Any = "ngram", asynchronous: bool = True, mrope: bool = True) -> Any:
        return SimpleNamespace(
            speculative_config=drafts,
            scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
            model_config=SimpleNamespace(uses_mrope=mrope),
            use_v2_model_runner=v2,
        )

    with pytest.raises(ValueError, match="loses count of positions"):
        refusals.refuse_drift(config())
    refusals.refuse_drift(config(**other))


def test_the_rust_frontend(sharp_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True, raising=False)
    assert "VLLM_USE_RUST_FRONTEND" in refusal(sharp_model, **engine_args())


def test_an_external_encoder_cache(sharp_model: Path) -> None:
    from vllm.config import ECTransferConfig

    transfer = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_producer")
    assert "external encoder cache" in refusal(sharp_model, **engine_args(), ec_transfer_config=transfer)


def test_lora_on_the_tower(sharp_model: Path) -> None:
    options = {"enable_lora": True, "enable_tower_connector_lora": True}
    assert "enable_tower_connector_lora" in refusal(sharp_model, **engine_args(), **options)


def test_a_backend_that_is_not_here(sharp_model: Path) -> None:
    other = "native" if torch.cuda.is_available() else "triton"
    assert f"backend {other!r} cannot run" in refusal(sharp_model, **engine_args(backend=other))


def test_settings_given_straight_to_vllm_are_checked_too(sharp_model: Path) -> None:
    assert "retention_ratio" in refusal(sharp_model, mm_processor_kwargs={"flashvid": {"retention_ratio": 3}})
    config = config_of(sharp_model, mm_processor_kwargs={"flashvid": {"retention_ratio": 0.5}})
    assert config.model_config.multimodal_config.is_multimodal_pruning_enabled()


def test_one_line_says_what_is_on(sharp_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        config_of(sharp_model)
        assert "FlashVID" not in caplog.text
        config_of(sharp_model, **engine_args(retention_ratio=0.1, alpha=0.6, request_overrides=False))
    finally:
        logger.removeHandler(caplog.handler)
    lines = [r for r in caplog.records if "FlashVID" in r.getMessage()]
    assert [r.levelname for r in lines] == ["INFO"]
    for part in (str(sharp_model), "Qwen2_5_VLForConditionalGeneration", "retention_ratio=0.1", "alpha=0.6",
                 "min_segments=4", "selection=attention_diversity", "requests may not change it",
                 "videos of at most 65536 tokens before compression (max_video_tokens)"):  # fmt: skip
        assert part in lines[0].getMessage()


def test_positions_of_a_model_with_mrope(sharp_model: Path) -> None:
    message = refusal(sharp_model, **engine_args(positions="consecutive"))
    assert "positions='consecutive'" in message
    assert "leave it out" in message
    config_of(sharp_model, **engine_args(positions="original"))  # which it has anyway


def test_original_positions_need_a_rope_that_vllm_has_with_mrope() -> None:
    from flashvid_vllm.models.rope import set_positions

    text = SimpleNamespace(
        rope_parameters={"rope_type": "linear", "factor": 2.0}, hidden_size=64, num_attention_heads=2
    )
    model = SimpleNamespace(architecture="LlavaOnevisionForConditionalGeneration", hf_text_config=text)
    with pytest.raises(ValueError, match="types default, yarn; this model's is 'linear'"):
        set_positions(model, {"positions": "original"})
    set_positions(model, {"positions": "consecutive"})
    assert "mrope_section" not in text.rope_parameters
    text.rope_parameters["rope_type"] = "default"
    set_positions(model, {"positions": "original"})
    assert sum(text.rope_parameters["mrope_section"]) == 16  # half of a head's 32 channels
