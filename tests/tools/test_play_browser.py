# SPDX-License-Identifier: MIT
"""`flashvid play` in a real Chromium, before a server that answers as vLLM with the plugin does."""

import base64
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make setup")
expect = playwright.expect

from flashvid_vllm.tools.play.app import DRAWN, Options, make_app  # noqa: E402

from .play_servers import FRAMES, TEXT_TOKENS, TOKENS, FakeVllm, fake_vllm, folder_of, running  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLAIN = str(TEXT_TOKENS + FRAMES * TOKENS)
HOSTILE = "<img src=x onerror=\"window.ran='name'\"><script>window.ran='name'</script>"

pytestmark = [
    pytest.mark.longer("drives a browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        # no sandbox of its own: it cannot have one as root, in a container
        expect.set_options(timeout=60_000)  # a slow machine is not at fault
        started = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@dataclass
class Table:
    """A page before its servers; ``problems`` are what the browser's console says."""

    page: Any
    app: Any
    fake: FakeVllm
    vllm: str
    url: str
    problems: list[str]

    def column(self, name: str) -> Any:
        return self.page.locator(f"#{name}")

    def prompt(self, name: str) -> Any:
        """Where a column tells its prompt tokens."""
        return self.column(name).locator("td:nth-child(3)").first


@pytest.fixture
def table(browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Table]:
    """A page 1200 wide, or as wide as the test's parameter says."""
    width = getattr(request, "param", 1200)
    (tmp_path / "moving.webm").write_bytes(DRAWN.read_bytes())
    with fake_vllm() as (fake, vllm), running(app := make_app(Options(base_url=vllm, samples=tmp_path))) as url:
        context = browser.new_context(viewport={"width": width, "height": 844}, has_touch=width < 600)
        page, problems = context.new_page(), []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        expect(page.locator("#server")).to_contain_text(f"tiny at {vllm}/v1")
        yield Table(page, app, fake, vllm, url, problems)
        context.close()


def drop(page: Any, name: str, content: bytes) -> None:
    """Drop a file on the page, as from a file manager."""
    script = """([name, text]) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, { type: "video/webm" }));
        return data;
    }"""
    data = page.evaluate_handle(script, [name, base64.b64encode(content).decode()])
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": data})


def test_a_clip_is_dropped_and_both_columns_answer(table: Table) -> None:
    """Faults: a drop that the browser takes for a visit; a column that stays empty; a slider without effect."""
    page = table.page
    drop(page, "dropped.webm", DRAWN.read_bytes())
    expect(page.locator("#name")).to_contain_text("dropped.webm")
    expect(page.locator("#video")).to_have_js_property("videoWidth", 480)
    page.fill("#question", "What rolls?")
    page.click("#ask")
    for name, tokens in (("plain", PLAIN), ("compressed", str(TEXT_TOKENS + FRAMES * TOKENS // 4))):
        column = table.column(name)
        expect(column.locator(".answer")).to_have_text("A ball rolls.")
        expect(column.locator(".prompt")).to_contain_text(f"{int(tokens):,}")
        expect(column.locator(".first")).to_contain_text(re.compile(r"^\d\.\d\d s"))
        expect(column.locator(".speed")).to_contain_text(re.compile(r"^\d+\.\d"))
    expect(page.locator("#verdict")).to_contain_text("Compressed: 26 % of the plain prompt’s tokens")
    assert [body["messages"][0]["content"][1]["text"] for body in table.fake.asked] == ["What rolls?"] * 2

    page.locator("#ratio").focus()
    for _ in range(15):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#ratio-shown")).to_have_text("10 %")
    expect(table.column("compressed")).to_have_class("stale")
    table.column("compressed").locator(".one").click()
    expect(table.prompt("compressed")).to_have_text(str(TEXT_TOKENS + FRAMES * TOKENS // 10))
    expect(page.locator("#verdict")).to_contain_text("12 % of the plain prompt’s tokens")

    page.fill("#budget", "77")  # chooses the budget, too
    page.select_option("#method", "tome")
    table.column("compressed").locator(".one").click()
    expect(table.prompt("compressed")).to_have_text(str(TEXT_TOKENS + 77))
    assert table.fake.asked[-1]["mm_processor_kwargs"] == {"flashvid": {"token_budget": 77, "method": "tome"}}
    for value, sent in (("0.25", 0.25), ("auto", "auto")):
        page.select_option("#encoder", value)
        table.column("compressed").locator(".one").click()
        expect(table.column("compressed").locator("tbody td:nth-child(2)").first).to_contain_text("encoder ")
        expect(table.column("compressed")).not_to_have_attribute("aria-busy", "true")
        assert table.fake.asked[-1]["mm_processor_kwargs"]["flashvid"]["encoder_ratio"] == sent
    assert table.problems == []


def test_the_same_prompt_again_is_told_from_the_first(table: Table) -> None:
    """Fault: a time that the caches made short, shown beside one that they did not."""
    table.page.click("#ask")
    expect(table.page.locator("#ask")).to_have_text("Ask both again")
    table.page.click("#ask")
    table.page.locator("#verdict", has_text="(again)").wait_for()
    table.page.fill("#question", "And now?")
    expect(table.page.locator("#ask")).to_have_text("Ask both")
    table.page.click("#ask")
    kinds = table.column("plain").locator("td:nth-child(1)")
    expect(kinds).to_have_text(["other question", "again", "first"])
    names = [body["messages"][0]["content"][0]["uuid"] for body in table.fake.asked]
    assert len(set(names)) == 2
    table.page.reload()
    table.page.locator("#ask").click()
    expect(table.column("compressed").locator("td:nth-child(1)")).to_have_text(["first"])
    assert len({body["messages"][0]["content"][0]["uuid"] for body in table.fake.asked}) == 4


def test_it_goes_by_the_keyboard_alone(table: Table) -> None:
    """Fault: what only a mouse reaches."""
    page = table.page

    def tab_to(id: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == id:
                return
        raise AssertionError(f"{id} is not reached by Tab")

    with page.expect_file_chooser() as chooser:
        tab_to("file")
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "chosen.webm", "mimeType": "video/webm", "buffer": DRAWN.read_bytes()})
    expect(page.locator("#name")).to_contain_text("chosen.webm")
    tab_to("question")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("What is chosen?")
    page.keyboard.press("Control+Enter")
    expect(table.prompt("compressed")).to_have_text("270")
    tab_to("ratio")
    page.keyboard.press("Home")
    page.keyboard.press("Control+Enter")
    expect(table.prompt("compressed")).to_have_text("30")


def test_requests_go_in_turn_unless_both_are_asked_for_at_once(table: Table) -> None:
    """Fault: two requests share the server while the page says that each had it to itself."""
    table.fake.stalls = "prefill"
    table.page.click("#ask")
    expect(table.column("plain")).to_have_attribute("aria-busy", "true")
    expect(table.column("plain").locator(".wait")).to_contain_text(re.compile(r"first token: [1-9]"))
    assert len(table.fake.asked) == 1
    table.page.click("#stop")
    expect(table.column("plain").locator(".wait")).to_have_text("stopped")
    expect(table.page.locator("#ask")).to_be_enabled()
    assert table.fake.gone.wait(60)
    assert len(table.fake.asked) == 1
    table.page.check('input[value="once"]')
    expect(table.page.locator("#order-note")).to_contain_text("share the server")
    table.page.click("#ask")
    expect(table.column("compressed")).to_have_attribute("aria-busy", "true")
    expect(table.column("plain")).to_have_attribute("aria-busy", "true")
    table.fake.gone.clear()
    table.page.close()
    assert table.fake.gone.wait(60)
    assert len(table.fake.asked) == 3


def test_errors_are_told(table: Table) -> None:
    """Faults: an error that is swallowed; another column's answer lost with it."""
    page = table.page
    page.fill("#budget", "0")
    page.click("#ask")
    error = table.column("compressed").locator(".error")
    expect(error).to_contain_text("The server refused (HTTP 400): token_budget must be a whole number from 1")
    expect(table.column("plain").locator(".answer")).to_have_text("A ball rolls.")
    page.fill("#budget", "")
    table.column("compressed").locator(".one").click()
    expect(error).to_contain_text("Give the budget as a whole number")  # not the default ratio instead
    page.locator('input[value="ratio"]').check()
    page.click("#ask")
    expect(table.prompt("compressed")).to_have_text("270")
    expect(error).to_be_hidden()
    table.fake.plugin = "closed"
    page.click("#ask")
    expect(error).to_contain_text("without --no-flashvid-request-overrides")
    page.reload()
    expect(page.locator("#trouble")).to_contain_text("takes no 'flashvid' settings from requests")
    table.fake.plugin = "ignored"
    page.click("#recheck")
    expect(page.locator("#trouble")).to_be_hidden()
    page.click("#ask")
    expect(page.locator("#verdict")).to_contain_text("was not compressed: does the server run with --plugin flashvid?")
    drop(page, "notes.txt", b"text")
    expect(page.locator("#clip-error")).to_contain_text("'notes.txt' is not taken for a video")
    page.evaluate("page.state.most_bytes = 3")
    drop(page, "large.webm", b"large")
    expect(page.locator("#clip-error")).to_contain_text("--max-upload-mib")


def test_a_server_that_is_down_is_told_and_found_again(browser: Any) -> None:
    """Fault: a page that has to be started anew when the server comes up, or hangs when flashvid play ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        with running(make_app(Options(base_url=f"http://127.0.0.1:{port}"))) as url:
            page.goto(url)
            expect(page.locator("#trouble")).to_contain_text(f"No server answers at http://127.0.0.1:{port}/v1")
            with fake_vllm(port):
                page.click("#recheck")
                expect(page.locator("#server")).to_contain_text("tiny at")
                expect(page.locator("#trouble")).to_be_hidden()
        page.click("#ask")
        expect(page.locator("#plain .error")).to_contain_text("is it still running in its terminal?")


def test_names_and_answers_are_text(table: Table) -> None:
    """Fault: HTML in a file's name, a model's name, an error or an answer is made part of the page."""
    page = table.page
    table.fake.answer = [HOSTILE.replace("name", "answer"), "<b>bold</b> [link](javascript:window.ran=1)"]
    table.fake.models = [HOSTILE, "tiny"]
    page.reload()
    page.select_option("#model", "tiny")
    drop(page, f"{HOSTILE}.webm", DRAWN.read_bytes())
    expect(page.locator("#name")).to_contain_text(HOSTILE)
    page.click("#ask")
    for name in ("plain", "compressed"):
        expect(table.column(name).locator(".answer")).to_have_text("".join(table.fake.answer))
        expect(table.column(name).locator(".answer *:not(span)")).to_have_count(0)
    page.select_option("#model", HOSTILE)
    drop(page, f"{HOSTILE}.html", b"x")
    expect(page.locator("#clip-error")).to_contain_text("window.ran")
    assert page.evaluate("window.ran") is None
    with pytest.raises(playwright.Error, match="TrustedHTML"):  # what forgets this is stopped by the browser
        page.evaluate("document.body.innerHTML = '<b>x</b>'")


def test_an_answer_without_text_says_so(table: Table) -> None:
    """Fault: an empty box beside token counts and times, as if the page had lost the answer."""
    page = table.page
    table.fake.answer = [" ", "\n"]
    page.click("#ask")
    for name in ("plain", "compressed"):
        expect(table.column(name).locator(".answer")).to_contain_text("no text")
        expect(table.column(name).locator(".speed")).to_contain_text("2 tokens in all")
    table.fake.answer = ["seen"]
    table.column("plain").locator(".one").click()
    expect(table.column("plain").locator(".answer")).to_have_text("seen")


def test_pages_of_other_sites_get_nothing(table: Table) -> None:
    """Fault: a page that the user visits reads the clips, or spends the server."""
    page = table.page
    page.goto(f"{table.vllm}/elsewhere")
    script = """async ([url, mode]) => {
        try {
            const response = await fetch(url + "/api/clips?name=planted.mp4", { method: "POST", body: "x", mode });
            return response.type + response.status;
        } catch (error) { return "refused"; }
    }"""
    assert page.evaluate(script, [table.url, "cors"]) == "refused"
    page.evaluate(script, [table.url, "no-cors"])
    framed = """(url) => new Promise((done) => {
        const frame = document.createElement("iframe");
        frame.onload = done;
        frame.src = url;
        document.body.append(frame);
    })"""
    page.evaluate(framed, table.url)
    assert not list(folder_of(table.app).iterdir())
    assert not any("flashvid play" in frame.title() for frame in page.frames[1:])


@pytest.mark.parametrize("table", [390], indirect=True)
def test_it_fits_a_phone(table: Table) -> None:
    """Fault: something wider than the screen, or a control too small for a finger."""
    page = table.page
    drop(page, f"{'a-long-name-without-a-break' * 8}.webm", DRAWN.read_bytes())
    table.fake.answer = ["supercalifragilistic" * 20, " end"]
    page.tap("#ask")
    expect(table.prompt("compressed")).to_have_text("270")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    controls = """[...document.querySelectorAll("button, select, input, textarea, table, .answer, dd")]
        .filter((element) => element.checkVisibility() && !element.classList.contains("away"))"""
    sides = "[e.id || e.className || e.tagName, e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
    boxes = page.evaluate(f"{controls}.map((e) => {sides})")
    assert len(boxes) > 15
    assert [box for box in boxes if box[1] < 0 or box[2] > 390] == []
    heights = page.evaluate(f'{controls}.filter((e) => e.tagName === "BUTTON").map((e) => e.offsetHeight)')
    assert min(heights) >= 40


def test_kept_tokens_are_drawn_in_a_sandbox(browser: Any, tmp_path: Path) -> None:
    """Faults: viz's page does not run inside ours; or it runs with our rights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("cv2")
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=16
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    app = make_app(Options(base_url="http://127.0.0.1:9", tower=str(tmp_path), clip=True, frames=4))
    with browser.new_context() as context, running(app) as url:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        page.click("#draw")
        picture = page.frame_locator("#picture iframe")
        expect(picture.locator("#facts")).to_contain_text("49 (25.0 %)")
        expect(picture.locator("#when")).to_contain_text("frame 1 of 4")
        picture.locator("#slider").press("End")
        expect(picture.locator("#when")).to_contain_text("frame 4 of 4")
        frame = page.frames[-1]
        assert frame.evaluate("window.origin") == "null"
        assert frame.evaluate("fetch('/api/state').then(() => 'read', () => 'refused')") == "refused"
        page.locator("#ratio").fill("10")
        expect(page.locator("#kept-note")).to_contain_text("other settings")
        page.click("#draw")
        expect(picture.locator("#facts")).to_contain_text("19 (9.7 %)")
