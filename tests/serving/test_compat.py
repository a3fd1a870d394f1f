# SPDX-License-Identifier: MIT
"""What we build on in vLLM, and what happens where it is not there."""

import argparse
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from flashvid_vllm import models
from flashvid_vllm.models import FAMILIES
from flashvid_vllm.serving import compat


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True), ("0.32.0+cpu", True), ("0.33.1.dev5+g123", True), ("0.31.2", False), ("0.34.0", False),
        ("1.0", False), ("none", False), ("0.32rc1", False),
    ],
)  # fmt: skip
def test_the_supported_range(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    reason = compat.unsupported_vllm()
    assert (reason is None) == supported
    if reason:
        assert version in reason
        assert ">=0.32,<0.34" in reason


def test_a_changed_signature_stops_the_start() -> None:
    def create_engine_config(self: object, something_new: int) -> None: ...

    with pytest.raises(RuntimeError, match=r"create_engine_config takes .*something_new"):
        compat._expect(create_engine_config, "self", "usage_context", "headless")


def test_registering_twice_changes_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    import flashvid_vllm

    flashvid_vllm.register()
    before = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    flashvid_vllm.register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


@pytest.mark.parametrize("command", ["serve", "bench throughput", "bench latency", "run-batch"])
def test_the_options_are_wherever_vllm_adds_engine_arguments(command: str) -> None:
    from vllm.benchmarks import latency, throughput
    from vllm.entrypoints.launchers import cli_args, run_batch
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make = {
        "serve": cli_args.make_arg_parser, "bench throughput": throughput.add_cli_args,
        "bench latency": latency.add_cli_args, "run-batch": run_batch.make_arg_parser,
    }[command]  # fmt: skip
    parser = FlexibleArgumentParser()
    made = make(parser) or parser
    arguments = ["--plugin", "flashvid", "--flashvid-retention-ratio", "0.1", "--flashvid-config.alpha", "0.5"]
    arguments += ["-i", "in", "-o", "out"] if command == "run-batch" else []
    namespace: argparse.Namespace = made.parse_args(arguments)
    assert namespace.mm_processor_kwargs == {"flashvid": {"alpha": 0.5, "retention_ratio": 0.1}}


def test_every_family_but_one_exists_in_vllm_under_the_same_name() -> None:
    from vllm.model_executor.models.registry import _VLLM_MODELS

    for architecture, family in FAMILIES.items():
        assert (architecture in _VLLM_MODELS) == (architecture != "LlavaQwenForCausalLM")
        assert (Path(models.__file__).parent / "families" / f"{family.module}.py").exists()
