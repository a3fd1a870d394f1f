# SPDX-License-Identifier: MIT
"""Our options in a YAML file (`vllm serve MODEL --config FILE`): obeyed, or no server starts.

vLLM drops what is false in such a file, so that a server which its operator believes closed took overrides.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import flashvid_vllm

OPEN: dict[str, Any] = {}
CLOSED = {"request_overrides": False}


@pytest.fixture(scope="module")
def parser() -> Any:
    """As `vllm` makes it: the file is read by the parser above the subcommand's."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flashvid_vllm.register()
    parser = FlexibleArgumentParser(prog="vllm")
    serve = parser.add_subparsers(dest="subparser").add_parser("serve")
    serve.add_argument("model_tag", nargs="?")
    make_arg_parser(serve)
    return parser


@pytest.fixture
def settings(parser: Any, tmp_path: Path) -> Callable[..., Any]:
    """The server's settings of a file and further arguments; None: without the plugin."""

    def settings(text: str, *arguments: str) -> Any:
        (tmp_path / "server.yaml").write_text(text)
        where = arguments or ("--config", "FILE")
        where = tuple(part.replace("FILE", str(tmp_path / "server.yaml")) for part in where)
        return (parser.parse_args(["serve", "model", *where]).mm_processor_kwargs or {}).get("flashvid")

    return settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flashvid-request-overrides: false", CLOSED),
        ("flashvid-request-overrides: no", CLOSED),  # YAML's false
        ("flashvid_request_overrides: false", CLOSED),
        ("no-flashvid-request-overrides: true", CLOSED),
        ("no_flashvid_request_overrides: true", CLOSED),
        ("flashvid-config: {request_overrides: false}", CLOSED),
        ("flashvid-config: '{\"request_overrides\": false}'", CLOSED),
        ("flashvid-config:\n  enabled: false", {"enabled": False}),
        ("flashvid-request-overrides: true", OPEN),
        ("no-flashvid-request-overrides: false", OPEN),
        ("flashvid-retention-ratio: 0.1\nflashvid_config: {alpha: 0.5}", {"retention_ratio": 0.1, "alpha": 0.5}),
        ("flashvid-token-budget: 100\nenforce-eager: false", {"token_budget": 100}),
    ],
)
def test_what_a_file_says_is_in_force(settings: Callable[..., Any], line: str, expected: Any) -> None:
    assert settings(f"plugin: flashvid\n{line}\nport: 8001\n") == expected
    assert settings(f"{line}\nplugin: flashvid\n") == expected


def test_a_file_without_the_plugin_changes_nothing(settings: Callable[..., Any]) -> None:
    assert settings("enforce-eager: false\nenable-prefix-caching: false\nport: 8001\n") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('flashvid-request-overrides: "false"', 'has flashvid-request-overrides: "false"; expected true or false'),
        ("flashvid-request-overrides: 0", "expected true or false"),
        ("flashvid-request-overrides:", "null; expected true or false"),
        ("flashvid-request-overrides: [false]", "expected true or false"),
        ("no-flashvid-request-overrides: []", "expected true or false"),
        ("flashvid-request-overrides: false\nno_flashvid_request_overrides: false", "leave one of them out"),
        ("flashvid-request-override: false", "no option; FlashVID's are plugin, flashvid-retention-ratio"),
        ("flash-vid-request-overrides: false", "no option"),
        ("flashvid-retention-ratio: false", "expected one value"),
        ("flashvid-method: []", "expected one value"),
        ("flashvid-token-budget: true", "expected one value"),
        ("flashvid-config: false", "settings such as"),
        ("flashvid-config: [alpha]", "settings such as"),
        ("flashvid-config.request_overrides: false", "write it below flashvid-config"),
        ("flashvid-config: {request_overrides: null}", "request_overrides must be true or false"),
        ("flashvid-request-overrides: true\nflashvid-config: {request_overrides: false}", "contradict each other"),
        ("plugin: false", "expected flashvid"),
        ("plugin: [flashvid, other]", "expected flashvid"),
    ],
)
def test_what_would_be_dropped_is_refused(
    settings: Callable[..., Any], line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = "" if line.startswith("plugin") else "plugin: flashvid\n"
    with pytest.raises(SystemExit):
        settings(f"{plugin}{line}\n")
    assert message in capsys.readouterr().err


def test_a_closed_door_without_the_plugin_is_refused(
    settings: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings("flashvid-request-overrides: false\n")
    assert "--no-flashvid-request-overrides needs --plugin flashvid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--flashvid-request-overrides"], {"alpha": 0.5}),
        (["--no-flashvid-request-overrides"], {"alpha": 0.5} | CLOSED),
        ([], {"alpha": 0.5} | CLOSED),
        # an object on the command line would replace the file's as a whole, a dotted one likewise
        (["--flashvid-config", '{"merge_threshold": 0.9}'], {"alpha": 0.5, "merge_threshold": 0.9} | CLOSED),
        (["--flashvid-config.merge_threshold", "0.9"], {"alpha": 0.5, "merge_threshold": 0.9} | CLOSED),
        (["--flashvid-config", '{"alpha": 0.6}'], {"alpha": 0.6} | CLOSED),
    ],
)
def test_the_command_line_is_before_the_file(
    settings: Callable[..., Any], arguments: list[str], expected: dict[str, Any]
) -> None:
    text = "plugin: flashvid\nflashvid-request-overrides: false\nflashvid-config: {alpha: 0.5}\n"
    assert settings(text, "--config", "FILE", *arguments) == expected
    assert settings(text, *arguments, "--config", "FILE") == expected


def test_a_closed_door_stays_closed_beside_dotted_settings(settings: Callable[..., Any]) -> None:
    """vLLM appends dotted arguments as one more object, which replaced the one before."""
    closed = ["--plugin", "flashvid", "--flashvid-config", '{"request_overrides": false}']
    assert settings("", *closed, "--flashvid-config.alpha", "0.5") == {"alpha": 0.5} | CLOSED


@pytest.mark.parametrize("line", ["plugin: flashvid", "flashvid-request-overrides: false", "no_flashvid-x: true"])
def test_a_file_that_vllm_does_not_read(
    settings: Callable[..., Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes `--config FILE` alone; a server of `--config=FILE` was plain."""
    with pytest.raises(SystemExit):
        settings(f"{line}\n", "--config=FILE")
    assert "with a space" in capsys.readouterr().err
    assert settings("port: 8001\n", "--config=FILE") is None
