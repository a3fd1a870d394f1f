# SPDX-License-Identifier: MIT
"""`flashvid tune` from the command line, against a server whose answers are known."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from flashvid_vllm.tools.tune.__main__ import main

from .fake_openai import CLOSED, NO_ENABLED, TRUSTING, WITHOUT, FakeServer

HOSTILE = "<img src=x onerror=alert(1)>\"'"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def tune(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run it; returns the exit code, stdout and stderr."""

    def run(data: Path, *options: str) -> tuple[int, str, str]:
        report, results = tmp_path / "report.html", tmp_path / "results.jsonl"
        own = ["--base-url", server.url, "--results", str(results), "-o", str(report), "--timed", "0"]
        try:
            code = main([str(data), *own, *options])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


def choices(folder: Path, kinds: Sequence[str], answered: bool = True, questions: int = 2) -> Path:
    """A JSONL of questions with choices about videos of these kinds, each of other bytes."""
    lines = []
    for number, kind in enumerate(kinds):
        (folder / f"{number}.mp4").write_bytes(f"{kind} {number}".encode())
        for question in range(questions):
            entry = {"video": f"{number}.mp4", "question": f"Which {question}?", "choices": ["x", "y", "z"]}
            lines.append(json.dumps(entry | ({"answer": "y"} if answered else {})))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def by_name(folder: Path) -> dict[str, Any]:
    return {row["name"]: row for row in report(folder)["rows"]}


def test_the_grid_finds_where_answers_change(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """Wrong pairing of answers, a setting that is not sent, or a video counted as several trials shows here."""
    code, out, _ = tune(choices(tmp_path, ["robust"] * 190 + ["fragile"] * 10, questions=1))
    assert code == 0
    rows = by_name(tmp_path)
    assert list(rows) == ["plain", "R = 0.5", "R = 0.25", "R = 0.15", "R = 0.1"]
    assert [row["prompt_tokens"][0] for row in rows.values()] == [1010, 510, 260, 160, 110]
    assert [row["agreement"][0] for row in rows.values()] == [1, 1, 1, 0.95, 0.95]
    assert rows["R = 0.25"]["agreement"][1] == pytest.approx(200 / (200 + 1.96**2), abs=1e-4)
    assert 0.9 < rows["R = 0.15"]["agreement"][1] < 0.95 < rows["R = 0.15"]["agreement"][2] < 0.99
    advice = report(tmp_path)["advice"]
    assert advice["verdict"] == "found"
    assert advice["options"] == "--plugin flashvid --flashvid-retention-ratio 0.25"
    assert "R = 0.25 is the smallest that keeps 98 % of the plain model's answers (100.0 %, lower bound 98.1 %;" in out
    assert "vllm serve fake --plugin flashvid --flashvid-retention-ratio 0.25" in out
    assert len(server.bodies) == 200 * 5
    assert all(body["temperature"] == 0 for body in server.bodies)


def test_accuracy_and_mcnemar_where_answers_are_given(tune: Any, tmp_path: Path) -> None:
    """The true answer is no part of what is asked; half of it missing counts only that half."""
    data = choices(tmp_path, ["fragile"] * 12)
    entries = [json.loads(line) for line in data.read_text().splitlines()]
    for entry in entries[::2]:
        del entry["answer"]
    data.write_text("\n".join(map(json.dumps, entries)))
    tune(data, "--ratios", "0.5", "0.1")
    rows = by_name(tmp_path)
    assert rows["plain"]["known"] == 12
    assert rows["plain"]["accuracy"][0] == rows["R = 0.5"]["accuracy"][0]
    assert rows["R = 0.5"]["mcnemar"] == 1
    # "y" becomes "z", and "x" becomes "y": whoever was right is wrong, and the other way round for those that said x
    assert rows["R = 0.1"]["agreement"][0] == 0
    assert rows["R = 0.1"]["accuracy"][0] + rows["plain"]["accuracy"][0] <= 1


def test_interrupted_it_goes_on_where_it_was(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """A result that is lost or asked twice; a last line that was cut off."""
    data = choices(tmp_path, ["robust"] * 5)
    server.gone_after = 13
    code, _, err = tune(data, "--ratios", "0.5", "--concurrency", "1")
    assert code == 1
    assert "the connection broke off" in err
    results = tmp_path / "results.jsonl"
    assert len(results.read_text().splitlines()) == 1 + 13
    with results.open("a") as file:
        file.write('{"kind": "answer", "item": "cut')
    server.gone_after = None
    server.bodies = []
    code, _, _ = tune(data, "--ratios", "0.5")
    assert code == 0
    assert len(server.bodies) == 10 * 2 - 13
    server.bodies = []
    assert tune(data, "--ratios", "0.5")[0] == 0  # all is known: nothing is asked, and it is told again
    assert server.bodies == []


def test_a_server_that_ends_is_not_asked_on(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """What was answered is kept, and the rest is no list of hundreds of failures."""
    server.ends_after = 7
    code, _, err = tune(choices(tmp_path, ["robust"] * 30), "--concurrency", "1")
    assert code == 2
    assert "is the server running? What was answered is kept in" in err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1 + 7


def test_ctrl_c_says_how_to_go_on(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashvid_vllm.tools.tune.collect import Collector

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "_answer", interrupt)
    code, _, err = tune(choices(tmp_path, ["robust"]))
    assert code == 130
    assert "the same command goes on where it was" in err


def test_another_video_model_or_way_of_asking_is_not_mixed(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """Answers of a file that has changed under its name, or of another model, must not be taken for these."""
    data = choices(tmp_path, ["robust"] * 2)
    assert tune(data, "--ratios", "0.5")[0] == 0
    (tmp_path / "0.mp4").write_bytes(b"robust, another")
    server.bodies = []
    assert tune(data, "--ratios", "0.5")[0] == 0
    assert len(server.bodies) == 2 * 2
    code, _, err = tune(data, "--ratios", "0.5", "--max-tokens", "5")
    assert code == 2
    assert "holds answers with max_tokens 64, and now it is 5" in err
    server.models = ["other"]
    code, _, err = tune(data, "--ratios", "0.5")
    assert code == 2
    assert "model 'fake', and now it is 'other'" in err
    server.bodies = []
    assert tune(data, "--ratios", "0.5", "--fresh")[0] == 0
    assert len(server.bodies) == 4 * 2
    (tmp_path / "results.jsonl").write_text("my notes\n")
    code, _, err = tune(data)
    assert code == 2
    assert "holds no results of flashvid tune" in err
    assert (tmp_path / "results.jsonl").read_text() == "my notes\n"


def test_single_failures_are_listed(tune: Any, tmp_path: Path) -> None:
    """A video that the server refuses, one that cannot be read: the others are counted, and only they."""
    data = choices(tmp_path, ["robust"] * 4 + ["broken"], questions=1)
    with data.open("a") as file:
        file.write('\n{"video": "missing.mp4", "question": "?"}')
    code, _, err = tune(data, "--ratios", "0.5")
    assert code == 1
    assert "failed: 4.mp4, 'Which 0?', plain: HTTP 400: cannot decode <b>this</b> video" in err
    assert "missing.mp4: No such file" in err
    assert by_name(tmp_path)["R = 0.5"]["videos"] == 4
    page = (tmp_path / "report.html").read_text()
    assert "cannot decode &lt;b&gt;this" in page


def test_nothing_works(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """Thousands of items are not tried one by one where the first ten all fail."""
    code, _, err = tune(choices(tmp_path, ["broken"] * 30), "--concurrency", "1")
    assert code == 2
    assert "the first 10 requests all failed" in err
    assert len(server.bodies) == 10


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (WITHOUT, "does not run the plugin; start it with vllm serve MODEL --plugin flashvid"),
        (TRUSTING, "takes any setting, even retention_ratio=2: it does not run the plugin"),
        (CLOSED, "was started with --no-flashvid-request-overrides"),
        (NO_ENABLED, "refuses a question of one word: HTTP 400: enabled: not here"),
    ],
)
def test_servers_that_cannot_be_tuned(tune: Any, server: FakeServer, tmp_path: Path, mode: str, message: str) -> None:
    """Told before a video is sent; a server that ignores settings would look as if every ratio kept everything."""
    server.mode = mode
    code, _, err = tune(choices(tmp_path, ["robust"]))
    assert code == 2
    assert message in err
    assert server.bodies == []


def test_a_setting_that_the_server_refuses(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    code, _, err = tune(choices(tmp_path, ["robust"]), "--methods", "evs", "tome")
    assert code == 2
    assert "the server refuses R = 0.5, tome: HTTP 400: method='tome' cannot run here" in err
    assert server.bodies == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--positions", "original"), "--positions is the server's alone"),
        (("--ratios", "1.5"), "retention_ratio must be a number in (0, 1], got 1.5"),
        (("--methods", "evs", "--config", '{"alpha": 0.5}'), "alpha=0.5 is a setting of FlashVID"),
        (("--keep", "98"), "--keep must be a share between 0 and 1"),
        (("--no-likelihood", "--by", "likelihood"), "exclude each other"),
        (("--body", '{"messages": []}'), "--body cannot give 'messages'"),
        (("-o", "report.pdf"), "-o must end in .html"),
        (("--model", "another"), "the server has the models fake; --model another is none of them"),
        (("--concurrency", "0"), "must be 1 or more, got 0"),
        (("--timeout", "-1"), "--timeout must be seconds above 0, up to 86400 (a day), got -1"),
        (("--timeout", "nan"), "--timeout must be seconds above 0"),
        (("--timeout", "1e300"), "--timeout must be seconds above 0"),
        (("--body", '{"mm_processor_kwargs": 5}'), "--body: mm_processor_kwargs must be an object, got 5"),
        (("--body", '{"mm_processor_kwargs": null}'), "mm_processor_kwargs must be an object, got null"),
        (("--body", r'{"user": "\ud800"}'), "--body cannot be sent: it has NaN, Infinity or half of a surrogate pair"),
        (("--body", '{"top_p": NaN}'), "--body cannot be sent"),
        (("--body", '{"a":' + "[" * 20000), "argument --body: not JSON"),
        (("--", "--dtype", "float32"), "--dtype behind -- is for a server that --model starts"),
    ],
)
def test_options_that_make_no_sense(tune: Any, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, _, err = tune(choices(tmp_path, ["robust"]), *options)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) <= 2  # the error, and how much there is to ask


def test_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = choices(tmp_path, ["robust"])
    for url, message in (
        ("http://127.0.0.1:9/v1", "is the server running?"),
        *((url, "must be a URL such as") for url in ("localhost:8000", "http://[/v1", "http://:80", "http://a..b/v1")),
        *((f"http://localhost:{port}/v1", "must be a URL such as") for port in ("port", "99999", "0")),
    ):
        with pytest.raises(SystemExit) as exit:
            main([str(data), "--base-url", url, "--results", str(tmp_path / "r.jsonl")])
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert "What was answered is kept" not in err  # nothing was, and there is no such file
    for arguments, message in (([str(data)], "give --base-url URL of a server"), ([""], "expected a JSONL file or")):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_a_key_that_no_header_holds(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schl\u00fcssel")
    code, _, err = tune(choices(tmp_path, ["robust"]))
    assert code == 2
    assert "OPENAI_API_KEY has characters that no HTTP header can hold" in err


def test_an_error_of_the_server_costs_one_item(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """vLLM closes a connection after a 500 without saying so: what is sent over it next gets no answer."""
    code, _, err = tune(
        choices(tmp_path, ["robust", "crashing", "robust"], questions=1), "--ratios", "0.5", "--concurrency", "1"
    )
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("failed")] == [
        "failed: 1.mp4, 'Which 0?', plain: HTTP 500: engine error"
    ]
    assert by_name(tmp_path)["R = 0.5"]["videos"] == 2


@pytest.mark.parametrize("line", ['{"x": 1}', "[]", '{"kind": "answer", "item": "0", "setting": "plain", "text": "x"}'])
def test_results_with_a_line_of_something_else(tune: Any, tmp_path: Path, line: str) -> None:
    """It is named, and nothing in the file is lost."""
    data, results = choices(tmp_path, ["robust"]), tmp_path / "results.jsonl"
    assert tune(data, "--ratios", "0.5")[0] == 0
    head, *rest = results.read_text().splitlines()
    text = "\n".join([head, rest[0], line, *rest[1:], ""])
    results.write_text(text)
    code, _, err = tune(data, "--ratios", "0.5")
    assert code == 2
    assert f"results.jsonl:3 is no result of flashvid tune: {line}; delete that line" in err
    assert results.read_text() == text


def test_choices_that_failed_do_not_decide(tune: Any, tmp_path: Path) -> None:
    """Free text was answered in every setting; only the item with choices was not."""
    data = choices(tmp_path, ["broken"], questions=1)
    lines = []
    for number in range(1, 4):
        (tmp_path / f"{number}.mp4").write_bytes(f"robust {number}".encode())
        lines.append(json.dumps({"video": f"{number}.mp4", "question": "What?"}))
    data.write_text("\n".join([data.read_text(), *lines]))
    for more, by in (((), "likelihood"), (("--no-likelihood", "--fresh"), "agreement")):
        code, out, _ = tune(data, "--ratios", "0.5", *more)
        assert code == 1
        assert report(tmp_path)["by"] == by
        assert by_name(tmp_path)["R = 0.5"]["free"] == 3
        assert "Nothing can be said" not in out


def test_letters_tell_choices_apart_that_words_would_not(tune: Any, tmp_path: Path) -> None:
    """From "C" to "C++" is another answer, and one of them is right."""
    (tmp_path / "a.mp4").write_bytes(b"fragile")
    entry = {"video": "a.mp4", "question": "Which?", "choices": ["C", "C++", "C#"], "answer": "C"}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry))
    assert tune(tmp_path / "data.jsonl", "--ratios", "0.5", "0.1")[0] == 0
    rows = by_name(tmp_path)
    assert [rows[name]["agreement"][0] for name in ("R = 0.5", "R = 0.1")] == [1, 0]
    assert rows["plain"]["accuracy"][0] + rows["R = 0.1"]["accuracy"][0] <= 1
    code, _, err = tune(tmp_path / "data.jsonl", "--choices", "words", "--fresh")
    assert code == 2
    assert "with --choices words case and punctuation at the ends do not count" in err


def test_free_text(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """The score is of the plain answer's tokens in this item; the floor is another video's, the ceiling is plain.

    A fragile video keeps 8 R of its 8 words, so its first 4 agree at R = 0.5 alone; the log-probability falls
    from -0.1 to -1.1 without any token, and is -2.1 for another video: R of the way in halves.
    """
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.mp4").write_bytes(f"fragile {number}".encode())
    code, out, _ = tune(folder, "--ratios", "0.5", "0.25", "--same-tokens", "4")
    assert code == 0
    rows = by_name(tmp_path)
    assert [row["agreement"][0] for row in rows.values()] == [1, 1, 0]
    assert [row["common_tokens"] for row in rows.values()] == [9, 4, 2]
    assert [row["logprob"] for row in rows.values()] == pytest.approx([-0.1, -0.6, -0.85])
    assert [row["likelihood"][0] for row in rows.values()] == pytest.approx([1, 0.75, 0.625])
    assert report(tmp_path)["floor"] == pytest.approx(-2.1)
    assert report(tmp_path)["by"] == "likelihood"
    assert "None of them keeps 98 % of what the video adds to the plain answers' likelihood" in out
    assert sum("prompt_logprobs" in body for body in server.bodies) == 30 * (2 + 2)


def test_the_floor_is_of_a_video_that_can_be_answered_about(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """The next video may be unreadable, or fail beside this question alone: another will do, and no item is lost."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, kind in enumerate(["fragile", "broken", "fragile", "unscored", "fragile"]):
        (folder / f"{number}.mp4").write_bytes(f"{kind} {number}".encode())
    code, _, err = tune(folder, "--ratios", "0.5")
    assert code == 1
    failed = [line for line in err.splitlines() if line.startswith("failed")]
    assert len(failed) == 5 + 2 * 5  # the broken one's answers, and what the other is asked itself
    assert not [line for line in failed if "score of floor" in line]
    row = by_name(tmp_path)["R = 0.5"]
    assert (row["scored"], row["likelihood"][0]) == (15, pytest.approx(0.75))
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(line.get("setting") == "floor" for line in found) == 20


def test_an_impossible_token_does_not_outweigh_all_others(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """vLLM says -9999 of one; the other seven words and the other answers would count for nothing beside it."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, kind in enumerate(["fragile", "impossible"]):
        (folder / f"{number}.mp4").write_bytes(f"{kind} {number}".encode())
    assert tune(folder, "--ratios", "0.5")[0] == 0
    logprob = by_name(tmp_path)["R = 0.5"]["logprob"]
    assert logprob == pytest.approx((-0.6 + (7 * -0.6 - 50) / 8) / 2)


def test_one_video_tells_nothing_of_others(tune: Any, tmp_path: Path) -> None:
    """No interval is made up for a single video, and no floor without another."""
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "one.mp4").write_bytes(b"robust")
    code, out, _ = tune(folder, "--ratios", "0.5")
    assert code == 0
    assert report(tmp_path)["advice"]["verdict"] == "too few data"
    assert "on 1 video " in out


def test_too_few_videos(tune: Any, tmp_path: Path) -> None:
    """All of six videos alike have a bootstrap interval of no width: the bound is Wilson's, and 189 videos would do."""
    code, out, _ = tune(choices(tmp_path, ["robust"] * 6), "--ratios", "0.5")
    assert code == 0
    advice = report(tmp_path)["advice"]
    assert (advice["verdict"], advice["videos"]) == ("too few data", 189)
    assert "too few to tell: on 6 videos R = 0.5 keeps 100.0" in out
    assert "about 189 would do" in out


def test_words_are_answers_too(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """Asked as it stands, without the letters, and nothing is forced upon the answer."""
    (tmp_path / "a.mp4").write_bytes(b"robust")
    from .fake_openai import WORDS, words_of

    said = " ".join(WORDS[i - 3] for i in words_of(b"robust", "red , blue : which"))
    entry = {"video": "a.mp4", "question": "red , blue : which", "choices": ["red", said.upper() + "."], "answer": "B"}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry))
    code, _, _ = tune(tmp_path / "data.jsonl", "--choices", "words", "--ratios", "0.5")
    assert code == 0
    assert by_name(tmp_path)["plain"]["accuracy"][0] == 1
    assert all("structured_outputs" not in body for body in server.bodies)
    assert {body["messages"][0]["content"][1]["text"] for body in server.bodies} == {"red , blue : which"}


def test_times_are_taken_alone_and_past_the_caches(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """A name or a salt that is used twice would let a cache answer."""
    code, out, _ = tune(choices(tmp_path, ["robust"] * 4), "--ratios", "0.5", "--timed", "3")
    assert code == 0
    timed = [body for body in server.bodies if body.get("stream")]
    assert len(timed) == 3 * 2 + 1
    for name in ("uuid", "cache_salt"):
        used = {body["messages"][0]["content"][0]["uuid"] if name == "uuid" else body[name] for body in timed}
        assert len(used) == len(timed)
    assert len({body["messages"][0]["content"][0]["video_url"]["url"] for body in timed}) == 3
    assert by_name(tmp_path)["R = 0.5"]["first_token"][0] > 0
    assert "TTFT, s" in out


class Tags(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_runs_nothing_that_a_video_or_a_model_says(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """Names, questions, choices, answers and the server's messages are text; nothing is fetched."""
    lines = []
    for number, kind in enumerate(["fragile", "fragile", "broken"]):
        name = f"{HOSTILE.replace('/', '')} {number}.mp4"
        (tmp_path / name).write_bytes(f"{kind} {number}".encode())
        entry = {"video": name, "question": HOSTILE, "choices": [f"{HOSTILE} {i}" for i in range(3)], "answer": "A"}
        lines.append(json.dumps(entry))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    server.models = [HOSTILE]
    code, _, _ = tune(tmp_path / "data.jsonl", "--ratios", "0.5", "0.1")
    assert code == 1
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert {tag for tag, _ in tags.tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert not [attrs for _, attrs in tags.tags if any(name.startswith("on") for name in attrs)]
    for _, attrs in tags.tags:
        assert (attrs.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert not attrs.get("href")
    assert "default-src 'none'" in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 5
    assert not re.search(r"url\(|@import|https?://", page)


def test_frames_of_what_differs_are_shown(tune: Any, server: FakeServer, tmp_path: Path) -> None:
    """A folder of images is a video: sent as vLLM's list of frames, and shown where its answer changes."""
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    (tmp_path / "clip").mkdir()
    for number in range(9):
        cv2.imwrite(str(tmp_path / "clip" / f"{number}.png"), np.full((90, 320, 3), 20 * number, np.uint8))
    entry = {"video": "clip", "question": "A fragile <b>?", "choices": ["x", "y"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry))
    code, _, _ = tune(tmp_path / "data.jsonl", "--ratios", "0.5", "0.1")
    assert code == 0
    sent = server.bodies[0]["messages"][0]["content"][0]["video_url"]["url"]
    assert sent.startswith("data:video/jpeg;base64,")
    assert sent.count(",") == 9
    page = (tmp_path / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 6
    assert 'class="differs"><b>R = 0.1</b>' in page
    assert "R = 0.5</b>" in page
