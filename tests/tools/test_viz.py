# SPDX-License-Identifier: MIT
"""What the pictures of a compressed video show: the towers' features, the compression's result, whole files."""

import base64
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashvid_vllm import FlashVidConfig, compress
from flashvid_vllm.models import QWEN_PRESET

cv2 = pytest.importorskip("cv2")
transformers = pytest.importorskip("transformers")

from flashvid_vllm.tools.errors import UserError  # noqa: E402
from flashvid_vllm.tools.viz import features, need  # noqa: E402
from flashvid_vllm.tools.viz.__main__ import main  # noqa: E402
from flashvid_vllm.tools.viz.page import page_data  # noqa: E402
from flashvid_vllm.tools.viz.scene import Scene, make_scene  # noqa: E402
from flashvid_vllm.tools.viz.sheet import sheet_size, write_sheet  # noqa: E402
from flashvid_vllm.tools.viz.video import Frames, read_frames  # noqa: E402

FRAMES, HEIGHT, WIDTH = 9, 112, 168


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> directory of its tiny fp32 model."""
    from benchmarks.common.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(kind, folder / kind, dtype=torch.float32)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square moves over a still scene; the scene changes after 5 frames. 5 frames a second."""
    path = tmp_path_factory.mktemp("video") / "moving & <b>.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (WIDTH, HEIGHT))
    assert writer.isOpened()
    for t in range(FRAMES):
        picture = np.full((HEIGHT, WIDTH, 3), (180, 90, 40) if t < 5 else (30, 160, 200), dtype=np.uint8)
        picture[40:80, 12 * t : 12 * t + 40] = (240, 240, 30 * t)
        writer.write(picture)
    writer.release()
    return path


def made_up(frames: int, rows: int, columns: int) -> features.Encoded:
    """Features of which many are alike in time."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, rows * columns, 16, generator=generator)
    noise = torch.randn(frames, rows * columns, 16, generator=generator)
    attention = torch.rand(frames, rows * columns, generator=generator)
    levels = torch.full((frames, 2 * rows * columns, 3), 80, dtype=torch.uint8)  # two rows of the tower to a token
    grids = (rows, columns), (rows, 2 * columns)
    return features.Encoded(still + 0.4 * noise, attention, grids[0], 1, {}, levels, grids[1], keeps_positions=False)


def made_up_scene(frames: int = 6, config: FlashVidConfig | None = None, height: int = 60, width: int = 90) -> Scene:
    pictures = np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    read = Frames(pictures, list(range(0, 10 * frames, 10)), 10.0)
    return make_scene("title", "model", read, made_up(frames, 4, 5), config or FlashVidConfig(retention_ratio=0.3))


def test_what_is_drawn_is_what_is_served() -> None:
    """`adaptive` asks whether the LLM sees tokens at their positions; LLaVA's does not, unless the server says so."""
    config, encoded = FlashVidConfig(retention_ratio=0.4, method="adaptive"), made_up(6, 4, 5)
    drawn = made_up_scene(config=config).video.source_index
    served = {keeps: compress(encoded.features, None, config, keeps_positions=keeps) for keeps in (False, True)}
    assert torch.equal(drawn, served[False].source_index)
    assert not torch.equal(drawn, served[True].source_index)


def data_of(path: Path) -> dict[str, Any]:
    """The data that a page embeds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


# --- features


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_onevision_clip", "qwen2_5_vl", "qwen3_vl"])
def test_a_models_features_and_attention_are_the_oracles(model: Callable[[str], Path], kind: str) -> None:
    pytest.importorskip("vllm")  # which tests.support.engine needs
    from ..support.engine import Clip
    from ..support.oracles import llava_onevision, qwen2_5_vl, qwen3_vl

    oracles: dict[str, Any] = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
    clip = Clip(7, HEIGHT, WIDTH)
    got = features.encode_with_model(str(model(kind)), clip.frames())
    expected, attention, grid = oracles.get(kind, llava_onevision).Oracle(model(kind)).video(clip)
    assert (len(got.features), *got.grid) == grid
    assert got.frames_each == (2 if kind.startswith("qwen") else 1)
    assert got.preset == (QWEN_PRESET if kind.startswith("qwen") else {})
    assert got.keeps_positions == kind.startswith("qwen")
    width = got.features.shape[2]  # DeepStack's levels lie behind
    torch.testing.assert_close(got.features.cpu(), expected[..., :width], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.attention.cpu(), attention, rtol=1e-4, atol=0)
    # the pixels that are chosen from: each at its place, of this brightness
    assert got.levels.shape[:2] == (len(got.features), math.prod(got.row_grid))
    pictures = clip.frames()[:: got.frames_each]
    side = (WIDTH, HEIGHT) if kind.startswith("qwen") else (112, 112)
    rows, columns = got.row_grid
    small = np.stack([cv2.resize(cv2.resize(p, side), (columns, rows), interpolation=cv2.INTER_AREA) for p in pictures])
    seen = got.levels.float().mean(2).view(-1, rows, columns).numpy()
    assert np.corrcoef(seen.ravel(), small.mean(3).ravel())[0, 1] > 0.9
    assert abs(seen.mean() - small.mean()) < 4


@torch.inference_mode()
def test_clips_features_and_attention_are_those_of_its_last_layer_but_one(clip_model: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
    got = features.encode_with_clip(str(clip_model), frames)
    eager = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_model, attn_implementation="eager")
    pixels = transformers.CLIPImageProcessor(size={"height": 112, "width": 112}, do_center_crop=False)(
        list(frames), return_tensors="pt"
    ).pixel_values
    out = eager(pixels, output_hidden_states=True, output_attentions=True)
    assert got.grid == (7, 7)
    torch.testing.assert_close(got.features.cpu(), out.hidden_states[-2][:, 1:], rtol=0, atol=1e-5)
    expected: Tensor = out.attentions[-2].mean((1, 2))[:, 1:]
    torch.testing.assert_close(got.attention.cpu(), expected, rtol=1e-4, atol=0)


# --- frames


def test_frames_are_at_even_distances(video: Path) -> None:
    frames = read_frames(video, 5)
    assert frames.index == [0, 2, 4, 6, 8]
    assert frames.pictures.shape == (5, HEIGHT, WIDTH, 3)
    assert np.abs(frames.pictures[0, 5, 5].astype(int) - (40, 90, 180)).max() < 12  # RGB, after JPEG
    assert frames.label(1, 2) == "0.40, 0.80 s"
    assert read_frames(video, 99).index == list(range(FRAMES))


def test_a_file_that_tells_a_wrong_length_is_read_to_its_end(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cv2.VideoCapture

    class Capture:
        def __init__(self, path: str) -> None:
            self.capture = real(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.capture, name)

        def get(self, what: int) -> float:
            return 0.0 if what == cv2.CAP_PROP_FRAME_COUNT else float(self.capture.get(what))

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    assert read_frames(video, 3).index == [0, 4, 8]


class Broken:
    """A video of which some frames can be grabbed and not decoded, and some have another size."""

    def __init__(self, path: Path, lost: set[int], small: set[int]) -> None:
        self.real, self.path, self.lost, self.small, self.passes = cv2.VideoCapture, str(path), lost, small, 0

    def __call__(self, path: str) -> "Broken":
        assert path == self.path
        self.passes += 1
        assert self.passes < 5, "the file is read again and again"
        self.capture, self.at = self.real(path), -1
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.capture, name)

    def grab(self) -> bool:
        self.at += 1
        return bool(self.capture.grab())

    def retrieve(self) -> tuple[bool, Any]:
        done, picture = self.capture.retrieve()
        if self.at in self.lost:
            return False, None
        return done, picture[::2, ::2] if self.at in self.small else picture


def test_a_frame_that_cannot_be_decoded_is_left_out(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken for the end of the file, which was read for ever then: to the end, to that frame, to the end."""
    monkeypatch.setattr(cv2, "VideoCapture", Broken(video, {3, 7}, set()))
    frames = read_frames(video, FRAMES)
    assert frames.index == [i for i in range(FRAMES) if i not in (3, 7)]
    assert len(frames.pictures) == FRAMES - 2
    assert frames.label(3, 3) == "0.80 s"
    assert "left out: 3, 7" in capsys.readouterr().err
    monkeypatch.setattr(cv2, "VideoCapture", Broken(video, set(range(FRAMES)), set()))
    with pytest.raises(UserError, match="not a video"):
        read_frames(video, FRAMES)


def test_a_frame_of_another_size_is_resized(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Broken(video, set(), {2, 4}))
    assert read_frames(video, 5).pictures.shape == (5, HEIGHT, WIDTH, 3)
    assert f"frames of {WIDTH // 2} x {HEIGHT // 2} are resized to" in capsys.readouterr().err


@pytest.mark.parametrize(("lost", "small"), [({3}, set()), (set(), {3})])
def test_benchmarks_do_not_guess(video: Path, monkeypatch: pytest.MonkeyPatch, lost: set[int], small: set[int]) -> None:
    """Their readers took such a frame for the end, or failed in numpy."""
    from benchmarks.common import clips

    monkeypatch.setattr(clips, "clip", lambda name: video)
    assert len(clips.read("made-up", 64)) == FRAMES
    monkeypatch.setattr(cv2, "VideoCapture", Broken(video, lost, small))
    with pytest.raises(RuntimeError, match="frame 3 of the clip made-up"):
        clips.read("made-up", 64)


# --- the page


def test_the_page_shows_what_compress_returns(
    video: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, directory = tmp_path / "out.html", str(model("qwen2_5_vl"))
    settings = ["--retention-ratio", "0.2", "--config", '{"alpha": 0.5, "min_segments": 2}', "--frames", "8"]
    assert main([str(video), "-o", str(out), "--model", directory, *settings]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")

    frames = read_frames(video, 8)
    encoded = features.encode_with_model(directory, frames.pictures)
    given: dict[str, Any] = {**QWEN_PRESET, "retention_ratio": 0.2, "alpha": 0.5, "min_segments": 2}
    expected = compress(encoded.features, encoded.attention, FlashVidConfig(**given))
    data = data_of(out)
    assert data["title"] == "moving & <b>.avi"
    assert data["grid"] == [4, *encoded.grid]
    assert data["source_index"] == expected.source_index.tolist()
    assert data["size"] == expected.size.tolist()
    assert data["assignment"] == expected.assignment.flatten().tolist()
    facts = dict(data["facts"])
    assert facts["kept"].startswith(f"{len(expected.size)} (")
    assert "alpha=0.5" in facts["settings"]
    assert "selection=attention_diversity," in facts["settings"]
    frame = (expected.source_index // encoded.attention.shape[1]).tolist()
    kept = [frame.count(t) for t in range(4)]
    assert [a + b for a, b in zip(data["single"], data["several"], strict=True)] == kept
    assert sum(data["single"]) == int((expected.size == 1).sum())
    assert len(data["frames"]) == 4
    for entry, original in zip(data["frames"], frames.pictures[::2], strict=True):
        jpeg = base64.b64decode(entry["source"].removeprefix("data:image/jpeg;base64,"))
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(picture.astype(int) - original).mean() < 8


class Checker(HTMLParser):
    """Every opened element is closed, and what refers to something."""

    VOID = ("meta", "input", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_parses_and_refers_to_nothing_outside(video: Path, clip_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main([str(video), "-o", str(out), "--clip", str(clip_model), "--token-budget", "40"]) == 0
    text = out.read_text()
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert not checker.links
    assert checker.seen.count("script") == 2
    assert not re.search(r"https?://|@import|url\(|@@", text)
    assert "<title>moving &amp; &lt;b&gt;.avi" in text
    assert len(data_of(out)["size"]) == 40


def test_trees_that_touch_differ_in_colour() -> None:
    scene = made_up_scene()
    colour, size = scene.colour, scene.video.size.numpy()
    assert (colour >= 0).tolist() == (size > 1).tolist()
    assignment = scene.video.assignment.view(scene.grid).numpy()
    for one, other in ((assignment[:, 1:], assignment[:, :-1]), (assignment[..., 1:], assignment[..., :-1])):
        for a, b in zip(one.ravel(), other.ravel(), strict=True):
            assert a == b or min(a, b) < 0 or colour[a] != colour[b] or colour[a] < 0


def test_segments_are_those_of_the_compression() -> None:
    scene = made_up_scene(config=FlashVidConfig(retention_ratio=0.3, segment_threshold=-1.0, min_segments=4))
    assert scene.segment[-1] == 3
    assert len(scene.cuts()) == 3
    assert page_data(scene)["flashvid"]


def test_what_the_encoder_copies_is_hatched(tmp_path: Path) -> None:
    """Fault: patches of another place or frame, or of the tokens' grid; a page or picture that breaks on it."""
    pytest.importorskip("matplotlib")
    read = Frames(np.zeros((6, 60, 90, 3), dtype=np.uint8), list(range(6)), 10.0)
    encoded = made_up(6, 4, 5)
    encoded.levels[4:, 13] = 250  # the second row, fourth of ten columns: changes once
    config = FlashVidConfig(retention_ratio=0.3, encoder_ratio=41 / 240)
    scene = make_scene("title", "model", read, encoded, config)
    assert scene.computed is not None
    assert scene.computed.shape == (6, 4, 10)
    assert scene.computed.sum(0)[1, 3] == 2
    assert scene.computed.sum() == 41
    assert (scene.computed.sum(0) >= 1).all()
    assert dict(scene.facts)["encoder"] == "41 of 240 patches computed (17.1 %)"
    assert (np.array(page_data(scene)["copied"]) == ~scene.computed).all()
    write_sheet(scene, tmp_path / "less.png")
    write_sheet(made_up_scene(), tmp_path / "all.png")
    assert page_data(made_up_scene())["copied"] == []
    less, whole = (cv2.imread(str(tmp_path / name)) for name in ("less.png", "all.png"))
    assert less.shape == whole.shape


def test_a_peer_has_no_segments_and_drops_tokens() -> None:
    scene = made_up_scene(config=FlashVidConfig(token_budget=30, method="uniform"))
    data = page_data(scene)
    assert (scene.segment, scene.cuts(), data["flashvid"]) == ([], [], False)
    assert data["assignment"].count(-1) == 90
    assert dict(scene.facts)["settings"] == "token_budget=30, method=uniform"


# --- the picture


@pytest.mark.parametrize(("frames", "method"), [(1, "flashvid"), (6, "flashvid"), (23, "flashvid"), (6, "uniform")])
def test_the_picture_has_the_size_that_was_planned(tmp_path: Path, frames: int, method: Any) -> None:
    pytest.importorskip("matplotlib")
    scene = made_up_scene(frames, FlashVidConfig(retention_ratio=0.3, method=method))
    write_sheet(scene, tmp_path / "out.png")
    height, width = cv2.imread(str(tmp_path / "out.png")).shape[:2]
    assert (width, height) == sheet_size(scene)
    assert width == 1600


def test_tall_frames_stand_in_more_columns(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scene = made_up_scene(16, height=160, width=90)
    assert sheet_size(scene)[1] < sheet_size(made_up_scene(16, height=90, width=90))[1]


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("VIDEO -o OUT", "--model DIR .* or --clip DIR"),
        ("VIDEO -o OUT --model a --clip b", "one of them"),
        ("VIDEO", "required: -o"),
        ("VIDEO -o out.gif --model MODEL", r"must end in \.html or \.png, got out\.gif"),
        ("VIDEO -o no/such/out.png --model MODEL", "no such folder: no/such"),
        ("absent.mp4 -o OUT --model MODEL", "no such file: absent.mp4"),
        ("MODEL -o OUT --model MODEL", "is a folder, not a video"),
        ("TEXT -o OUT --model MODEL", "not a video that OpenCV can read"),
        ("VIDEO -o OUT --model ./nothing-here", "cannot load './nothing-here'"),
        ("VIDEO -o OUT --model CLIP", "this can look through Qwen2_5_VL"),
        ("VIDEO -o OUT --model LLAVA_VIDEO", "LlavaQwenForCausalLM, which transformers cannot load"),
        ("VIDEO -o OUT --clip MODEL", "is a llava_onevision, not CLIP"),
        ("VIDEO -o OUT --model MODEL --retention-ratio 2", r"retention_ratio must be a number in \(0, 1\]"),
        ("VIDEO -o OUT --model MODEL --retention-ratio x", "expected a number, got 'x'"),
        ("VIDEO -o OUT --model MODEL --config {", "not JSON"),
        ("VIDEO -o OUT --model MODEL --config {\"alhpa\":1}", "did you mean 'alpha'"),
        ("VIDEO -o OUT --model MODEL --config {\"enabled\":false}", "nothing to draw"),
        ("VIDEO -o OUT --model MODEL --method adts --config {\"method\":\"evs\"}", "both give method"),
        ("VIDEO -o OUT --clip CLIP --config {\"backend\":\"triton\"}", "triton"),
        ("VIDEO -o OUT --model MODEL --frames 0", "must be 1 or more"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    arguments: str,
    message: str,
    video: Path,
    model: Callable[[str], Path],
    clip_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, llava_video = tmp_path / "text.mp4", tmp_path / "llava_video"
    text.write_text("no video")
    llava_video.mkdir()
    (llava_video / "config.json").write_text('{"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava"}')
    values = {"VIDEO": video, "OUT": tmp_path / "o.html", "TEXT": text, "CLIP": clip_model, "LLAVA_VIDEO": llava_video}
    words = arguments.split()
    if "MODEL" in words:
        values["MODEL"] = model("llava_onevision")
    with pytest.raises(SystemExit) as stopped:
        main([str(values.get(word, word)) for word in words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "o.html").exists()


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib: pip install '\.\[viz\]'"):
        need("matplotlib")


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, flashvid_vllm, flashvid_vllm.tools.viz.__main__\n"
        "print([m for m in ('cv2', 'transformers', 'matplotlib', 'PIL', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
