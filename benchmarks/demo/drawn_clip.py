# SPDX-License-Identifier: MIT
"""The small clip that `flashvid play` offers where no samples are given: something to see, to count and to miss.

python -m benchmarks.demo.drawn_clip    draws flashvid_vllm/tools/play/sample.webm again
"""

import sys
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).resolve().parents[2] / "flashvid_vllm" / "tools" / "play" / "sample.webm"
SIZE = (480, 270)  # width, height
FPS = 8
SECONDS = 9


def frames() -> list[np.ndarray]:
    """Its frames, each [height, width, 3] uint8 BGR."""
    return [_frame(index / FPS) for index in range(FPS * SECONDS)]


def write(path: Path) -> None:
    """Write it in VP8, which every browser plays and OpenCV reads. Raises RuntimeError where OpenCV cannot."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP80"), FPS, SIZE)
    if not writer.isOpened():
        raise RuntimeError(f"this OpenCV cannot write VP8 to {path}")
    for picture in frames():
        writer.write(picture)
    writer.release()


def _frame(t: float) -> np.ndarray:
    """The frame [height, width, 3] uint8 BGR at ``t`` seconds: a ball rolls, the moon rises, a sign counts."""
    import cv2

    width, height = SIZE
    scene, t = divmod(t, 3)
    if scene == 0:  # day: a red ball rolls from left to right over a meadow
        picture = _sky((235, 200, 140), (250, 235, 215))
        cv2.rectangle(picture, (0, 190), (width, height), (80, 150, 70), -1)
        cv2.rectangle(picture, (330, 110), (430, 190), (120, 150, 190), -1)
        cv2.fillPoly(picture, [np.array([(320, 110), (440, 110), (380, 60)])], (60, 70, 150))
        cv2.circle(picture, (int(40 + 130 * t), 200), 24, (40, 40, 220), -1, cv2.LINE_AA)
    elif scene == 1:  # night: the moon rises behind hills
        picture = _sky((50, 25, 15), (110, 70, 50))
        cv2.circle(picture, (330, int(210 - 55 * t)), 30, (190, 240, 250), -1, cv2.LINE_AA)
        cv2.ellipse(picture, (120, 290), (220, 110), 0, 0, 360, (45, 40, 30), -1, cv2.LINE_AA)
        cv2.ellipse(picture, (400, 300), (240, 90), 0, 0, 360, (35, 30, 22), -1, cv2.LINE_AA)
    else:  # a sign that counts to three
        picture = _sky((200, 200, 205), (225, 225, 230))
        cv2.rectangle(picture, (150, 45), (330, 225), (90, 60, 40), -1)
        cv2.putText(picture, str(int(t) + 1), (185, 190), cv2.FONT_HERSHEY_DUPLEX, 5, (240, 240, 240), 10, cv2.LINE_AA)
    return picture


def _sky(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    width, height = SIZE
    share = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to((1 - share) * top + share * bottom, (height, width, 3)).astype(np.uint8).copy()


def main() -> int:
    """The command line."""
    write(SAMPLE)
    print(f"{SAMPLE}: {SAMPLE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
