# SPDX-License-Identifier: MIT
"""Our options on vLLM's command line: folded into vLLM's own, whatever their order."""

import argparse
import json
import re
from typing import Any

import pytest

from flashvid_vllm import engine_args
from flashvid_vllm.serving.cli import PRUNING_ON, add_options


def parse(*args: str, unsupported: str | None = None) -> argparse.Namespace:
    """As `vllm serve` does: a subparser with vLLM's options, then ours."""
    parser = argparse.ArgumentParser(prog="vllm")
    serve = parser.add_subparsers().add_parser("serve")
    serve.add_argument("--mm-processor-kwargs", type=json.loads)
    serve.add_argument("--video-pruning-rate", type=float)
    add_options(serve, unsupported)
    return parser.parse_args(["serve", *args])


def test_off_by_default() -> None:
    namespace = parse("--mm-processor-kwargs", '{"fps": 1}', "--video-pruning-rate", "0.5")
    assert namespace.mm_processor_kwargs == {"fps": 1}
    assert namespace.video_pruning_rate == 0.5


@pytest.mark.parametrize("first", [True, False])
def test_folded_whatever_the_order(first: bool) -> None:
    ours = ["--flashvid-retention-ratio", "0.1", "--plugin", "flashvid"]
    vllms = ["--mm-processor-kwargs", '{"fps": 1}']
    namespace = parse(*(ours + vllms if first else vllms + ours))
    assert namespace.mm_processor_kwargs == {"fps": 1, "flashvid": {"retention_ratio": 0.1}}
    assert namespace.video_pruning_rate == PRUNING_ON


def test_all_options() -> None:
    namespace = parse(
        "--plugin=flashvid", "--flashvid-token-budget", "1024",
        "--flashvid-config", '{"alpha": 1, "matching": "position"}', "--no-flashvid-request-overrides",
        "--flashvid-method", "ttm", "--flashvid-max-video-tokens", "9000", "--flashvid-encoder-ratio", "auto",
    )  # fmt: skip
    assert namespace.mm_processor_kwargs == {
        "flashvid": {
            "token_budget": 1024, "method": "ttm", "alpha": 1.0, "matching": "position", "request_overrides": False,
            "max_video_tokens": 9000, "encoder_ratio": "auto",
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plugin", "other"], "choose from"),
        (["--flashvid-retention-ratio", "0.1"], "needs --plugin flashvid"),
        (["--no-flashvid-request-overrides"], "needs --plugin flashvid"),
        (["--plugin", "flashvid", "--flashvid-retention-ratio", "0"], r"\(0, 1\], got 0.0"),
        (["--plugin", "flashvid", "--flashvid-retention-ratio", "ten"], "expected a number, got 'ten'"),
        (["--plugin", "flashvid", "--flashvid-retention-ratio", "nan"], "nan"),
        (["--plugin", "flashvid", "--flashvid-encoder-ratio", "half"], "expected a number or auto, got 'half'"),
        (["--plugin", "flashvid", "--flashvid-encoder-ratio", "2"], r"encoder_ratio must be .* or \"auto\", got 2.0"),
        (
            ["--plugin", "flashvid", "--flashvid-encoder-ratio", "1", "--flashvid-config", '{"encoder_ratio": 0.5}'],
            "both give encoder_ratio",
        ),
        (["--plugin", "flashvid", "--flashvid-token-budget", "0"], "token_budget"),
        (["--plugin", "flashvid", "--flashvid-token-budget", "1.5"], "expected a whole number"),
        (
            ["--plugin", "flashvid", "--flashvid-token-budget", "5", "--flashvid-retention-ratio", "0.1"],
            "exclude each other",
        ),
        (
            ["--plugin", "flashvid", "--flashvid-retention-ratio", "0.2", "--flashvid-config", '{"token_budget": 5}'],
            "exclude each other",
        ),
        (
            ["--plugin", "flashvid", "--flashvid-retention-ratio", "0.2",
             "--flashvid-config", '{"retention_ratio": 0.2}'],
            "both give retention_ratio",
        ),
        (["--flashvid-method", "evs"], "needs --plugin flashvid"),
        (["--plugin", "flashvid", "--flashvid-method", "fasty"], "method must be one of .*, fastv; got 'fasty'"),
        (["--plugin", "flashvid", "--flashvid-method", "best"], "method must be one of flashvid, .*got 'best'"),
        (
            ["--plugin", "flashvid", "--flashvid-method", "evs", "--flashvid-config", '{"method": "evs"}'],
            "--flashvid-method evs and --flashvid-config both give method",
        ),
        (
            ["--plugin", "flashvid", "--flashvid-method", "evs", "--flashvid-config", '{"alpha": 0.7}'],
            "alpha=0.7 is a setting of FlashVID, which method='evs' does not read",
        ),
        (["--plugin", "flashvid", "--flashvid-config", "{alpha: 1}"], "not JSON"),
        (["--plugin", "flashvid", "--flashvid-config", "[1]"], "expected a JSON object"),
        (["--plugin", "flashvid", "--flashvid-config", '{"alpa": 1}'], "did you mean 'alpha'"),
        (["--plugin", "flashvid", "--flashvid-config", '{"alpha": 2}'], "alpha"),
        (["--plugin", "other"], "invalid choice: 'other'.*'flashvid'"),
        (["--plugin", "flashvid", "--video-pruning-rate", "0.5"], "video-pruning-rate 0.5"),
        (["--plugin", "flashvid", "--mm-processor-kwargs", '{"flashvid": {}}'], "--flashvid-config"),
    ],
)  # fmt: skip
def test_refusals(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(*args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_an_unsupported_vllm_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(unsupported="too old").plugin is None
    with pytest.raises(SystemExit):
        parse("--plugin", "flashvid", unsupported="supports vllm>=0.32 and found 0.31")
    assert "found 0.31" in capsys.readouterr().err


def test_the_help_lists_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "adaptive, uniform, fastv. Default: flashvid." in " ".join(capsys.readouterr().out.split())


def test_engine_args() -> None:
    assert engine_args(method="tome")["mm_processor_kwargs"] == {"flashvid": {"method": "tome"}}
    assert engine_args(retention_ratio=0.1, mm_processor_kwargs={"fps": 1}) == {
        "mm_processor_kwargs": {"fps": 1, "flashvid": {"retention_ratio": 0.1}},
        "video_pruning_rate": PRUNING_ON,
    }
    bad: list[dict[str, Any]] = [
        {"retention_ratio": 2}, {"retention_ratoi": 0.1}, {"mm_processor_kwargs": {"flashvid": {}}},
        {"retention_ratio": 0.1, "token_budget": 3}, {"method": "fastv", "inner": False},
        {"method": "evs", "min_segments": 4},
    ]  # fmt: skip
    for settings in bad:
        with pytest.raises(ValueError, match=r"."):
            engine_args(**settings)
