# SPDX-License-Identifier: MIT
"""The tools of the demo and the tests: tiny models, clips, servers that leave nothing behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.common import clips
from benchmarks.common.ask import Answer, ask, video_url
from benchmarks.common.server import MARK, Progress, ServerError, VllmServer

ROOT = Path(__file__).resolve().parents[2]

# Stands in for `vllm serve`: a child in the group, one that left it and one that is deaf to SIGTERM.
FAKE_SERVER = """
import http.server, json, signal, subprocess, sys, time
sleep = "import time; time.sleep(600)"
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + sleep
subprocess.Popen([sys.executable, "-c", sleep])
subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
subprocess.Popen([sys.executable, "-c", deaf])
print("(EngineCore pid=1) INFO 01-31 10:20:30 [core.py:12] Loading weights", flush=True)
if "--die" in sys.argv:
    sys.exit("no such model")
if "--hang" in sys.argv:
    time.sleep(600)
requests = []
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(requests).encode())
    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        chunks = [base | {"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("", "Two ", "words")]
        chunks.append(base | {"choices": [], "usage": usage})
        self.send_response(200); self.send_header("Content-Type", "text/event-stream"); self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n"); self.wfile.flush(); time.sleep(0.1)
        self.wfile.write(b"data: [DONE]\\n\\n")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class FakeServer(VllmServer):
    """A VllmServer around FAKE_SERVER."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", FAKE_SERVER, *super().command[1:]]


def gone(processes: list[psutil.Process], seconds: float = 5) -> bool:
    """Whether all have ended. Without an init process to reap them, orphans stay as zombies: those count."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False


def test_server_starts_answers_and_leaves_nothing(tmp_path: Path) -> None:
    with FakeServer("org/model", log=tmp_path / "log", progress=False) as server:
        processes = server.processes()
        assert len(processes) == 4
        answer = ask(server.client(), server.model, None, "Why?", {"retention_ratio": 0.5}, 5, ignore_eos=True)
        (request,) = json.loads(urlopen(server.base_url))
        assert server.last_message() == "Loading weights"
    assert gone(processes)
    server.stop()  # harmless again
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("Two words", 7, 2)
    assert 0 < answer.ttft_s < answer.total_s
    assert answer.total_s - answer.ttft_s > 0.25  # the first chunk, not the last, stops the clock
    assert request["mm_processor_kwargs"] == {"flashvid": {"retention_ratio": 0.5}}
    assert request["ignore_eos"] is True


def urlopen(url: str) -> bytes:
    """GET without a proxy."""
    import httpx

    with httpx.Client(trust_env=False) as client:
        return client.get(url).content


@pytest.mark.parametrize(
    ("argument", "patience", "reason"),
    [("--die", 300, r"exit code 1\n(.*\n)*no such model"), ("--hang", 1.5, "did not answer")],
)
def test_server_that_fails_says_why_and_leaves_nothing(
    argument: str, patience: float, reason: str, tmp_path: Path
) -> None:
    server = FakeServer("org/model", argument, log=tmp_path / "log", timeout=patience, progress=False)
    with pytest.raises(ServerError, match=reason):
        server.start()
    assert not [p.pid for p in psutil.process_iter() if mark(p) == server.env[MARK]]


def mark(process: psutil.Process) -> str | None:
    """Whose server's process it is; None also for one that is gone or not ours."""
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):
        return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_is_stopped_when_its_user_is(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job ignores
        "from tests.benchmarks.test_serving_tools import FakeServer, Path\n"
        f"with FakeServer('org/model', log=Path({str(tmp_path / 'log')!r}), progress=False) as server:\n"
        "    print(*(p.pid for p in server.processes()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    user = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None
    with user.stdout:
        processes = [psutil.Process(int(pid)) for pid in user.stdout.readline().split()]
    assert len(processes) == 4
    user.send_signal(number)
    assert user.wait(timeout=30) != 0
    assert gone(processes)


def test_a_local_model_is_served_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("UNWANTED", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    local = VllmServer(tmp_path, log=tmp_path / "log", env={"UNWANTED": None, "WANTED": "2"})
    remote = VllmServer("org/model", log=tmp_path / "log")
    assert local.env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in remote.env
    assert "PYTHONDONTWRITEBYTECODE" not in local.env
    assert local.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert ("UNWANTED" in local.env, local.env["WANTED"]) == (False, "2")
    assert local.command[0] == str(Path(sys.executable).parent / "vllm")


class Starting:
    """Stands in for a server that starts."""

    progress = True

    def __init__(self, says: list[str], does: str) -> None:
        self.says, self.does = says, does

    def last_message(self) -> str:
        return self.says.pop(0)

    def busiest(self) -> str:
        return self.does


def test_progress_says_what_is_busy_when_the_log_says_nothing_new(capsys: pytest.CaptureFixture[str]) -> None:
    """An old message stood there for a minute, as if that were still going on."""
    server: Any = Starting(["Loading", "Loading", "Loaded", "Loaded"], "a process imports vLLM")
    progress = Progress(server)
    for seconds in (10, 20, 30, 40):
        progress.show(seconds)
    server.says, server.does = ["Loaded"], ""
    progress.show(50)
    first, second, third, fourth, fifth = capsys.readouterr().err.splitlines()
    assert first.endswith("s: Loading")
    assert second.endswith("20 s: a process imports vLLM (last said: Loading)")
    assert third.endswith("s: Loaded")
    assert fourth.endswith("s: a process imports vLLM (last said: Loaded)")
    assert fifth.endswith("s: nothing is busy (last said: Loaded)")


def test_the_busiest_process_is_named_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, pid: int, command: str) -> None:
            self.pid, self.command, self.seconds = pid, command, 5.0

        def cpu_times(self) -> Any:
            return SimpleNamespace(user=self.seconds, system=0.0)

        def cmdline(self) -> list[str]:
            return [self.command]

    server = VllmServer(tmp_path, log=tmp_path / "log")
    api, engine, worker = processes = [
        Process(1, "python vllm serve model"), Process(2, "python -c multiprocessing.spawn"), Process(3, "VLLM::Worker")
    ]  # fmt: skip
    monkeypatch.setattr(server, "processes", lambda: processes)
    server.busiest()
    assert server.busiest() == ""
    for process, said in ((api, "the API server imports"), (engine, "imports vLLM"), (worker, "the worker loads")):
        process.seconds += 4
        assert said in server.busiest()


def test_the_demo_warms_up_once_and_the_modes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.demo import __main__ as demo

    asked: list[Any] = []
    tokens = {"enabled": 400, "retention_ratio": 100}

    def ask(client: Any, model: str, video: Any, question: str, settings: Any = None, max_tokens: int = 9) -> Answer:
        asked.append(settings)
        return Answer("text", tokens[next(iter(settings))] if settings else 10, 1, float(len(asked)), 9.0)

    monkeypatch.setattr(demo, "ask", ask)
    server: Any = SimpleNamespace(client=lambda: None, model="model")
    text_tokens, results = demo.measure(server, Path("clip.mp4"), "What?", 2, 16)
    plain, quarter, tenth = demo.MODES.values()
    assert asked == [None, tenth, plain, quarter, tenth, plain, quarter, tenth]
    assert text_tokens == 10
    assert {mode: result.ttft_s for mode, result in results.items()} == {
        "plain": [3.0, 6.0], "keep 25 %": [4.0, 7.0], "keep 10 %": [5.0, 8.0],
    }  # fmt: skip


def test_video_url(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"abc")
    assert video_url(path) == "data:video/mp4;base64,YWJj"
    assert video_url("http://127.0.0.1/a.mp4") == "http://127.0.0.1/a.mp4"


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A package `toyclip` with one clip, the only one that pip can find; clips.CLIPS knows it as "toy"."""
    content = os.urandom(100)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "toyclip-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toyclip/a.mp4", content)
        wheel.writestr("toyclip-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toyclip\nVersion: 1.0\n")
        wheel.writestr("toyclip-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toyclip-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(clips.CLIPS, "toy", clips.Source("toyclip==1.0", "toyclip/a.mp4", digest, ""))
    return content


def test_clip_is_fetched_once_and_again_if_broken(toy_package: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips.clip("toy")
    assert path.read_bytes() == toy_package
    assert [p.name for p in path.parent.iterdir()] == ["toy.mp4"]
    path.write_bytes(b"broken")
    assert clips.clip("toy").read_bytes() == toy_package
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert clips.clip("toy") == path


def test_clip_that_cannot_be_had(toy_package: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"clip must be one of bikes, .*got 'bike'"):
        clips.clip("bike")
    monkeypatch.setitem(clips.CLIPS, "other", clips.Source("toyclip==1.0", "toyclip/a.mp4", "0" * 64, ""))
    with pytest.raises(RuntimeError, match="is not the file that was expected"):
        clips.clip("other")
    monkeypatch.setitem(clips.CLIPS, "absent", clips.Source("toyclip==2.0", "toyclip/a.mp4", "0" * 64, ""))
    with pytest.raises(RuntimeError, match=r"pip download toyclip==2.0 failed"):
        clips.clip("absent")


def test_probe(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    np = pytest.importorskip("numpy")
    path = tmp_path / "a.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(5):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    assert clips.probe(path) == clips.Video(frames=5, fps=10, width=64, height=48)
    assert clips.probe(path).seconds == 0.5
    path.write_text("no video")
    with pytest.raises(ValueError, match="not a video"):
        clips.probe(path)


def test_tiny_model_is_the_same_for_a_seed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import torch
    from safetensors.torch import load_file

    from benchmarks.common.tiny_model import make_tiny_model

    before = torch.random.get_rng_state()
    paths = [make_tiny_model("qwen2_5_vl", tmp_path / str(i), dtype=torch.float32, seed=i // 2) for i in range(3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [load_file(path / "model.safetensors") for path in paths]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    assert all(value.dtype == torch.float32 for value in weights[0].values())
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes()
    written = (paths[0] / "model.safetensors").stat().st_mtime_ns
    make_tiny_model("qwen2_5_vl", paths[0], dtype=torch.float32)
    assert (paths[0] / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="holds something else"):
        make_tiny_model("qwen2_5_vl", tmp_path / "mine")
    with pytest.raises(ValueError, match=r"kind must be one of qwen2_5_vl, .*got 'qwen'"):
        make_tiny_model("qwen", tmp_path / "other")


def test_chat_template_takes_media_in_any_order() -> None:
    pytest.importorskip("transformers")
    from benchmarks.common.tiny_model.qwen import make_qwen_tokenizer

    tokenizer, vocabulary, ids = make_qwen_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "This?"}, {"type": "video_url"}]},
    ]
    image, video = ("<|vision_start|><|" + name + "_pad|><|vision_end|>" for name in ("image", "video"))
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{video}and{image}<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nThis?{video}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = "Déjà vu: 今日は 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.get_vocab().values()) < vocabulary
    assert tokenizer.encode(video)[1] == ids["video_pad"]


@pytest.mark.longer("one more server")
@pytest.mark.usefixtures("forking_servers")
@pytest.mark.slow
def test_a_real_server_on_a_real_clip(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from benchmarks.common.tiny_model import make_tiny_model

    model = make_tiny_model("qwen2_5_vl", tmp_path / "model")
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--max-num-batched-tokens", "8192"]
    with VllmServer(model, *arguments, "--plugin", "flashvid", log=tmp_path / "log") as server:
        processes = server.processes()
        assert len(processes) >= 2  # the API server and its engine
        client = server.client()
        lengths = [
            ask(client, server.model, clips.clip("carphone"), "What?", flashvid, 4).prompt_tokens
            for flashvid in ({"enabled": False}, {"retention_ratio": 0.25}, {"retention_ratio": 0.1})
        ]
    # 4 s at 2 frames a second and 6 x 5 tokens for two frames: 120 tokens, of which 30 and 12 stay
    assert [lengths[0] - length for length in lengths] == [0, 90, 108]
    assert gone(processes)
