# SPDX-License-Identifier: MIT
"""`flashvid play` without a browser: who may ask, what is taken, what the model's server gets and what comes back."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from starlette.testclient import TestClient  # noqa: E402

from flashvid_vllm.tools.endpoint import message_of  # noqa: E402
from flashvid_vllm.tools.errors import UserError  # noqa: E402
from flashvid_vllm.tools.play import __main__, clips  # noqa: E402
from flashvid_vllm.tools.play.app import DRAWN, Options, make_app  # noqa: E402
from flashvid_vllm.tools.play.upstream import Upstream, with_version  # noqa: E402

from .play_servers import FRAMES, TEXT_TOKENS, TOKENS, FakeVllm, fake_vllm, folder_of, running  # noqa: E402

HOST = "http://127.0.0.1:8741"
PACKAGE = files("flashvid_vllm.tools.play")


@pytest.fixture
def upstream() -> Iterator[tuple[FakeVllm, str]]:
    with fake_vllm() as found:
        yield found


def client(url: str = "http://127.0.0.1:9", **options: Any) -> TestClient:
    """A client of the local server, which asks the model's server at ``url``."""
    return TestClient(make_app(Options(base_url=url, **options)), base_url=HOST)


def request_of(play: TestClient, **fields: Any) -> dict[str, Any]:
    """A request about the first sample."""
    clip = play.get("/api/state").json()["samples"][0]["id"]
    body = {"clip": clip, "session": "s", "model": "tiny", "question": "What?", "max_tokens": 8}
    return {**body, "settings": {"retention_ratio": 0.25}, **fields}


def ask(play: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The lines of an answer."""
    answer = play.post("/api/ask", json=request_of(play, **fields))
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


# --- who may ask


@pytest.mark.parametrize(
    ("bound", "names", "headers", "status"),
    [
        ("127.0.0.1", (), {}, 200),
        ("127.0.0.1", (), {"host": "localhost:9999"}, 200),  # a forwarded port
        ("127.0.0.1", (), {"host": "[::1]:8741"}, 200),
        ("127.0.0.1", (), {"host": "rebound.example:8741"}, 403),
        ("127.0.0.1", (), {"host": "127.0.0.1.rebound.example"}, 403),
        ("127.0.0.1", (), {"host": "192.168.0.5:8741"}, 403),
        ("127.0.0.1", (), {"host": ""}, 403),
        ("127.0.0.1", (), {"host": "[::1"}, 403),
        ("0.0.0.0", (), {"host": "192.168.0.5:8741"}, 200),
        ("0.0.0.0", (), {"host": "rebound.example:8741"}, 403),
        ("0.0.0.0", ("Box.Local",), {"host": "box.local:8741"}, 200),
        ("127.0.0.1", (), {"origin": HOST}, 200),
        ("127.0.0.1", (), {"origin": "http://127.0.0.1:9999"}, 403),
        ("127.0.0.1", (), {"origin": "https://elsewhere.example"}, 403),
        ("127.0.0.1", (), {"origin": "null"}, 403),
        ("127.0.0.1", (), {"origin": "http://["}, 403),
        ("127.0.0.1", (), {"sec-fetch-site": "same-origin"}, 200),
        ("127.0.0.1", (), {"sec-fetch-site": "none"}, 200),
        ("127.0.0.1", (), {"sec-fetch-site": "cross-site"}, 403),
        ("127.0.0.1", (), {"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_foreign_names_and_pages_are_refused(
    bound: str, names: tuple[str, ...], headers: dict[str, str], status: int
) -> None:
    """Faults: a rebound name, or a page of another site, reads answers or spends the user's server."""
    with client(host=bound, names=names) as play:
        upload = play.post("/api/clips?name=a.mp4", content=b"x", headers=headers)
        for answer in (play.get("/", headers=headers), upload):
            assert answer.status_code in ((200, 201) if status == 200 else (status,)), answer.text
        assert len(list(folder_of(play.app).iterdir())) == (status == 200)


def test_every_answer_forbids_what_the_page_does_not_need() -> None:
    """Fault: a route, or a refusal, without the policy; one that lets inline code run."""
    with client() as play:
        answers = [play.get(path) for path in ("/", "/page.js", "/api/state", "/nowhere", "/api/clips/none")]
        answers.append(play.get("/", headers={"host": "rebound.example"}))
        for answer in answers:
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "require-trusted-types-for 'script'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in " ".join(name for answer in answers for name in answer.headers)


def test_the_page_needs_nothing_from_elsewhere_and_writes_text_alone() -> None:
    """Fault: a font or a script of another host; a sink that runs what a name or an answer holds."""
    for name in ("page.html", "page.css", "page.js"):
        text = (PACKAGE / name).read_text()
        assert not re.search(r"https?:|//\w+\.|url\(|@import", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|srcdoc", text)


# --- clips


def test_a_clip_is_kept_under_a_name_of_our_own_and_played_as_a_video() -> None:
    """Faults: a path out of a name; an uploaded page that a browser would show."""
    name = "../../etc/<script>alert(1)</script>.mp4"
    with client() as play:
        answer = play.post("/api/clips", params={"name": name}, content=b"<html>")
        assert answer.status_code == 201
        found = answer.json()
        assert (found["name"], found["bytes"], found["sample"]) == (name, 6, False)
        assert re.fullmatch(r"[0-9a-f]{16}", found["id"])
        played = play.get(f"/api/clips/{found['id']}")
        assert played.content == b"<html>"
        assert played.headers["content-type"] == "video/mp4"
        assert "sandbox" in played.headers["content-security-policy"]
        part = play.get(f"/api/clips/{found['id']}", headers={"range": "bytes=1-4"})
        assert (part.status_code, part.content) == (206, b"html")


def test_an_upload_that_is_broken_off_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Fault: half a clip on the disk, or a traceback in the terminal, whenever a tab is closed."""
    app = make_app(Options(base_url="http://127.0.0.1:9"))
    with running(app) as play:
        port = int(play.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /api/clips?name=a.mp4 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode() + b"x" * 500)
            while not list(folder_of(app).iterdir()):
                pass
        while list(folder_of(app).iterdir()):
            pass
        assert httpx.post(f"{play}/api/clips?name=a.mp4", content=b"x").status_code == 201
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        ("a.mp4", b"x" * 2**20, 413, r"a\.mp4 has 1 MiB, and at most 0\.5 MiB .*--max-upload-mib"),
        ("a.mp4", iter([b"x" * 2**18] * 3), 413, "more than 0.5 MiB, and at most 0.5 MiB"),  # without a content-length
        ("a.mp4", b"", 400, "a.mp4 is empty"),
        ("a.html", b"x", 415, "'a.html' is not taken for a video: its name must end in .mp4"),
        ("a", b"x", 415, "'a' is not taken"),
    ],
)
def test_uploads_that_are_not_taken_leave_nothing(name: str, content: Any, status: int, message: str) -> None:
    """Fault: an upload without a bound, or what is left of a refused one."""
    app = make_app(Options(base_url="http://127.0.0.1:9", max_upload_mib=0.5))
    with TestClient(app, base_url=HOST) as play:
        answer = play.post("/api/clips", params={"name": name}, content=content)
        assert answer.status_code == status
        assert re.search(message, answer.json()["error"])
        assert not list(folder_of(app).iterdir())


def test_few_clips_are_held_and_none_stays_behind(tmp_path: Path) -> None:
    """Faults: a temporary folder that grows, or outlives the server; a user's own file removed with it."""
    sample = tmp_path / "mine.MP4"
    sample.write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("no video")
    app = make_app(Options(base_url="http://127.0.0.1:9", samples=tmp_path))
    with TestClient(app, base_url=HOST) as play:
        samples = play.get("/api/state").json()["samples"]
        assert [clip["name"] for clip in samples] == ["mine.MP4"]
        ids = [play.post("/api/clips?name=a.webm", content=bytes([i])).json()["id"] for i in range(clips.HELD + 2)]
        folder = folder_of(app)
        assert len(list(folder.iterdir())) == clips.HELD
        assert [play.get(f"/api/clips/{id}").status_code for id in ids] == [404, 404] + [200] * clips.HELD
        assert play.get(f"/api/clips/{samples[0]['id']}").content == b"mine"
        gone = play.post("/api/ask", json=request_of(play, clip=ids[0]))
        assert (gone.status_code, "choose it again" in gone.json()["error"]) == (404, True)
    assert not folder.exists()
    assert sample.exists()


def test_the_clip_that_comes_along_is_the_one_that_was_drawn() -> None:
    """Fault: the drawing was changed and not drawn again, or the file cannot be decoded."""
    cv2 = pytest.importorskip("cv2")
    from benchmarks.demo import drawn_clip

    assert drawn_clip.SAMPLE.samefile(DRAWN)
    capture = cv2.VideoCapture(str(DRAWN))
    expected = drawn_clip.frames()
    for picture in expected:
        done, found = capture.read()
        assert done
        assert np.abs(found.astype(int) - picture).mean() < 4
    assert not capture.read()[0]


# --- what goes to the model's server and what comes back


def test_an_answer_comes_in_pieces_with_its_figures(upstream: tuple[FakeVllm, str]) -> None:
    """Faults: another clip, question or setting is sent than was chosen; figures of something else."""
    fake, url = upstream
    with client(url) as play:
        *pieces, end = ask(play, settings={"retention_ratio": 0.1, "method": "tome"}, question="What rolls?")
        first, *texts = pieces
        assert first["first_s"] > 0
        assert [piece["text"] for piece in texts] == ["A ball ", "rolls."]
        assert end["prompt_tokens"] == TEXT_TOKENS + FRAMES * TOKENS // 10
        assert end["completion_tokens"] == 2
        assert end["total_s"] >= first["first_s"]
        assert end["tokens_per_s"] > 0
    [body] = fake.asked
    video, text = body["messages"][0]["content"]
    assert base64.b64decode(video["video_url"]["url"].removeprefix("data:video/webm;base64,")) == DRAWN.read_bytes()
    assert text["text"] == "What rolls?"
    assert body["mm_processor_kwargs"] == {"flashvid": {"retention_ratio": 0.1, "method": "tome"}}
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 8, "tiny")


def test_settings_do_not_find_each_others_caches_and_a_repeat_finds_its_own(upstream: tuple[FakeVllm, str]) -> None:
    """Fault: the column that asks second finds the clip prepared by the first, and looks faster than it is."""
    fake, url = upstream
    with client(url) as play:
        for settings in ({"enabled": False}, {"retention_ratio": 0.1}, {"enabled": False}):
            ask(play, settings=settings)
        ask(play, settings={"enabled": False}, session="after a reload")
        ask(play, settings={"enabled": False}, question="Something else?")
    names = [body["messages"][0]["content"][0]["uuid"] for body in fake.asked]
    assert names[0] == names[2] == names[4]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("plugin", "settings", "message"),
    [
        ("open", {"token_budget": 0}, r"HTTP 400.*token_budget must be a whole number from 1"),
        ("open", {"retention_ratoi": 1}, "did you mean 'retention_ratio'"),
        ("closed", {"enabled": False}, "takes no 'flashvid' settings.*\n.*without --no-flashvid-request-overrides"),
        ("absent", {"enabled": False}, "are disabled by default.*\n.*without the plugin"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    upstream: tuple[FakeVllm, str], plugin: str, settings: dict[str, Any], message: str
) -> None:
    """Fault: the server's reason is lost on the way, or what to do about it is not said."""
    fake, url = upstream
    fake.plugin = plugin
    with client(url) as play:
        [line] = ask(play, settings=settings)
        assert line["status"] == 400
        assert re.search(message, line["error"])
        check = play.post("/api/check", json={"model": "tiny"})
        assert check.status_code == (200 if plugin == "open" else 400)
        assert plugin == "open" or check.json()["error"] == line["error"]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("none", "the server sent no token counts"),
        ("error", "HTTP 500.*: the engine is dead"),
        ("[1, 2]", r"no chat completion: \[1, 2\]"),
        ('"error"', 'no chat completion: "error"'),
        ('{"choices": [1]}', "no chat completion .AttributeError"),
        ('{"usage": {"prompt_tokens": 1}}', "no token counts, but .*prompt_tokens"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(upstream: tuple[FakeVllm, str], ending: str, message: str) -> None:
    """Fault: half an answer taken for a whole one."""
    fake, url = upstream
    fake.ending = ending
    with client(url) as play:
        *_, text, last = ask(play)
        assert text == {"text": "rolls."}
        assert re.search(message, last["error"])


def test_a_server_that_is_not_there_or_is_another_is_told() -> None:
    """Fault: an exception instead of a message, at the start or when asked."""
    with client("http://user:secret@127.0.0.1:9") as play:
        state = play.get("/api/state")
        assert re.match(r"No server answers at http://127\.0\.0\.1:9/v1 \(.+Is vllm serve", state.json()["error"])
        [line] = ask(play)
        assert line["error"].startswith("No server answers")
        assert "secret" not in state.text + line["error"]
    with running(make_app(Options(base_url="http://127.0.0.1:9"))) as other, client(other) as play:
        assert "Not Found" in play.get("/api/state").json()["error"]


def test_the_key_goes_to_the_server_alone(upstream: tuple[FakeVllm, str]) -> None:
    """Fault: the page learns the key, be it from a server that repeats it."""
    fake, url = upstream
    fake.key = "sk-right"
    with client(url, api_key="sk-right") as play:
        assert play.get("/api/state").json()["models"] == ["tiny"]
        assert "error" not in ask(play)[-1]
    with client(url, api_key="sk-wrong") as play:
        state, [line] = play.get("/api/state").text, ask(play)
        assert "Unauthorized: Bearer ***\\nStart flashvid play with --api-key" in state
        assert "sk-wrong" not in state + line["error"]


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_what_the_user_breaks_off_ends_at_the_server(upstream: tuple[FakeVllm, str], where: str) -> None:
    """Fault: a closed tab leaves its request running; before the first token nothing is sent that could fail."""
    fake, url = upstream
    fake.stalls = where
    app = make_app(Options(base_url=url))
    with running(app) as play, httpx.Client(base_url=play) as http:
        clip = http.get("/api/state").json()["samples"][0]["id"]
        body = {"clip": clip, "session": "s", "model": "tiny", "question": "?", "max_tokens": 8, "settings": {}}
        with http.stream("POST", "/api/ask", json=body):
            assert fake.waiting.wait(20)
            assert not fake.gone.is_set()
        assert fake.gone.wait(20)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"question": " "}, 400, "type a question"),
        ({"question": "?" * 70000}, 413, "longer than 64 KiB"),
        ({"settings": None}, 400, "settings must be of type dict, got None"),
        ({"max_tokens": True}, 400, "max_tokens must be of type int, got True"),
        ({"max_tokens": 100000}, 400, "from 1 to 8192 tokens, got 100000"),
        ({"clip": "../../etc/passwd"}, 404, "no longer here"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, Any], status: int, message: str) -> None:
    """Fault: an exception, HTTP 500, or a request to the model's server that cannot succeed."""
    with client() as play:
        answer = play.post("/api/ask", json=request_of(play, **fields))
        assert answer.status_code == status
        assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"settings": {"alpha": NaN}}', "this cannot be sent as JSON"),
        ('{"question": "\\ud800"}', "this cannot be sent as JSON"),
        ("[" * 30000, "the body must be a JSON object"),
    ],
)
def test_json_that_cannot_be_passed_on_is_refused(text: str, message: str) -> None:
    """Fault: an empty answer, and a traceback in the terminal."""
    with client() as play:
        body = json.dumps(request_of(play))
        text = f"{body[:-1]}, {text[1:]}" if text.startswith("{") else text
        answer = play.post("/api/ask", content=text, headers={"content-type": "application/json"})
        assert message in answer.text


def test_a_sample_whose_name_is_no_text(tmp_path: Path) -> None:
    """Fault: one such file, and the page does not come up."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mp4"))
    path.write_bytes(b"x")
    with client(samples=tmp_path) as play:
        assert [clip["name"] for clip in play.get("/api/state").json()["samples"]] == ["bad?.mp4"]


def test_what_a_form_of_another_site_can_send_is_no_question() -> None:
    """Fault: a body of type text/plain, which browsers send anywhere without asking, is read as JSON."""
    with client() as play:
        body = json.dumps(request_of(play))
        assert play.post("/api/ask", content=body, headers={"content-type": "text/plain"}).status_code == 415
        assert play.post("/api/ask", content="[]", headers={"content-type": "application/json"}).status_code == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no", "code": 400}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": [1]}', "[1]"),
        (b'{"other": 1}', "{'other': 1}"),
        (b"Bad Gateway\xff", "Bad Gateway\ufffd"),
        (b"", ""),
    ],
)
def test_the_message_is_found_however_it_is_wrapped(body: bytes, message: str) -> None:
    """Fault: an error's wrapping shown for the error, or an endless search in it."""
    assert message_of(body) == message


def test_urls() -> None:
    """Fault: a URL that OpenAI clients take is not taken, or a wrong one is found out by a failed request only."""
    assert with_version("http://h:1") == with_version("http://h:1/v1/") == "http://h:1/v1"
    assert with_version("https://h/api/v3") == "https://h/api/v3"
    assert Upstream("http://u:p@h:1", None).shown_url == "http://h:1/v1"
    for wrong in ("localhost:8000", "ftp://h", "http://", "http://h:x"):
        with pytest.raises(UserError, match="--base-url must be such as"):
            with_version(wrong)


# --- kept tokens


def test_kept_tokens_are_vizs(clip_model: Path, tmp_path: Path) -> None:
    """Faults: other settings or another clip drawn than chosen; a drawn page that may do what the page may."""
    pytest.importorskip("cv2")

    from flashvid_vllm.tools.viz.__main__ import main

    with client(tower=str(clip_model), clip=True, frames=4) as play:
        body = {name: value for name, value in request_of(play).items() if name in ("clip", "settings")}
        found = play.post("/api/kept", json={**body, "settings": {"token_budget": 30, "method": "tome"}}).json()
        assert (found["kept"], found["total"]) == (30, 4 * 49)
        drawn = play.get(f"/api/kept/{found['id']}")
        assert "sandbox allow-scripts;" in drawn.headers["content-security-policy"] + ";"
        assert "default-src 'none'" in drawn.headers["content-security-policy"]
        out = tmp_path / "out.html"
        settings = ["--token-budget", "30", "--method", "tome", "--frames", "4"]
        assert main([str(DRAWN), "-o", str(out), "--clip", str(clip_model), *settings]) == 0
        assert drawn.text == out.read_text()
        for settings_, message in (({"token_budget": 0}, "token_budget must be"), ({"enabled": False}, "every token")):
            refused = play.post("/api/kept", json={**body, "settings": settings_})
            assert refused.status_code == 400
            assert message in refused.json()["error"]
        broken = play.post("/api/clips?name=a.mp4", content=b"no video").json()["id"]
        refused = play.post("/api/kept", json={**body, "clip": broken})
        assert "not a video that OpenCV can read" in refused.json()["error"]
    with client() as play:
        assert "--model DIR or --clip DIR" in play.post("/api/kept", json={}).json()["error"]


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--base-url localhost:8000", "must be such as http://localhost:8000/v1, got 'localhost:8000'"),
        ("--samples no/such", "--samples no/such: no such folder"),
        ("--samples tests/support/golden", r"no file there ends in \.mp4"),
        ("--port TAKEN", r"cannot listen at 127\.0\.0\.1:\d+: .*--port 0"),
        ("--port 70000", "from 0 to 65535, got 70000"),
        ("--max-upload-mib 0", "must be more than 0"),
        ("--model a --clip b", "not allowed with"),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a traceback, or a server that starts and fails later."""
    monkeypatch.chdir(Path(__file__).parents[2])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = arguments.replace("TAKEN", str(taken.getsockname()[1])).split()
        with pytest.raises(SystemExit) as stopped:
            __main__.main([*(["--port", "0"] if "--port" not in words else []), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: an ImportError without what to install."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        __main__.main([])
    assert "this needs uvicorn: pip install httpx starlette uvicorn" in capsys.readouterr().err


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: help that scrolls away, or has no examples."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 36
    assert text.count("  flashvid play --") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_it_serves_this_machine_alone_and_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    """Faults: the page on every interface; an upload that outlives the server; nothing heavy waits for its use."""
    command = [sys.executable, "-m", "flashvid_vllm.tools", "play", "--port", "0"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line + process.communicate()[1]
        with httpx.Client(base_url=found[0], trust_env=False) as http:
            assert http.get("/").status_code == 200
            assert http.post("/api/clips?name=a.mp4", content=b"x").status_code == 201
        with socket.socket() as other, pytest.raises(OSError, match="refused"):
            other.connect(("127.0.0.2", int(found[1])))
        assert len(list(tmp_path.glob("flashvid-play-*/*.mp4"))) == 1
        process.send_signal(number)
        _, errors = process.communicate()
        killer.cancel()
    assert not list(tmp_path.glob("flashvid-play-*"))
    assert "Traceback" not in errors
