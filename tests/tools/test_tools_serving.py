# SPDX-License-Identifier: MIT
"""The `vllm serve` that `flashvid tune --model` starts: a script in its place tells what it was given."""

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flashvid_vllm.tools.errors import UserError
from flashvid_vllm.tools.serving import serving

FAKE = """#!{python}
import http.server, subprocess, sys, time
if "--die" in sys.argv:
    print("(EngineCore) ERROR 01-01 [core.py:1] ValueError: no such model", flush=True)
    print("lines\\n" * 50 + "the end", flush=True)
    sys.exit(3)
if "--hang" in sys.argv:
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write((str(child.pid) + " " + " ".join(sys.argv[1:])).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`vllm` beside the interpreter, as in an environment."""
    script = tmp_path / "vllm"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def told(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode()).split()


def gone(process: int) -> bool:
    """Whether a process has ended, within 10 seconds; one that nobody has waited for is a zombie."""
    for _ in range(200):
        status = Path(f"/proc/{process}/status")
        try:
            if "\nState:\tZ" in status.read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_it_is_served_with_the_plugin_and_ended(fake: Path) -> None:
    """Child processes too, and nothing is left in the temporary folder."""
    with serving("org/model", ["--dtype", "float32"]) as url:
        child, *command = told(url)
        assert command[:4] == ["serve", "org/model", "--plugin", "flashvid"]
        assert command[-2:] == ["--dtype", "float32"]
        assert url.startswith("http://127.0.0.1:")
    assert gone(int(child))
    assert not list(fake.glob("flashvid-serve-*"))


def test_a_server_that_ends_is_told_with_its_error(fake: Path) -> None:
    """vLLM tells what was wrong long before its last lines."""
    with pytest.raises(UserError, match=r"ended with exit code 3") as error, serving("m", ["--die"]):
        pass
    assert "ValueError: no such model" in str(error.value)
    assert "the end\n(all of it: " in str(error.value)
    assert list(fake.glob("flashvid-serve-*"))


def test_a_server_that_does_not_answer_is_ended(fake: Path) -> None:
    with pytest.raises(UserError, match="did not answer within 1 s"), serving("m", ["--hang"], seconds=1):
        pass


@pytest.mark.parametrize("option", ["--port", "--host=0.0.0.0", "--plugin"])
def test_options_that_are_given_already(fake: Path, option: str) -> None:
    with pytest.raises(UserError, match="is given to the server already"), serving("m", [option, "1"]):
        pass


def test_no_vllm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no vllm here; install it, or give --base-url"), serving("m", []):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_too(fake: Path, number: signal.Signals) -> None:
    """A server that outlives what started it holds the GPU's memory."""
    code = (
        f"import signal, sys; sys.executable = {str(fake / 'python')!r}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job ignores
        "from flashvid_vllm.tools.serving import serving\n"
        "import time\n"
        "with serving('m', []) as url: print(url, flush=True); time.sleep(600)\n"
    )
    python = (fake / "vllm").read_text().splitlines()[0].removeprefix("#!")
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    child = int(told(process.stdout.readline().strip())[0])
    process.send_signal(number)
    process.wait(60)
    assert gone(child)
