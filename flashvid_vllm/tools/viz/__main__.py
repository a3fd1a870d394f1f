# SPDX-License-Identifier: MIT
"""The command line: flashvid viz VIDEO --model DIR -o out.html."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.config import FlashVidConfig
from ...core.settings import ORIGINAL, POSITIONS, SINGLE, check_server, resolve
from ...serving.cli import json_object, number
from ..command import Parser, count
from ..errors import UserError

HELP = """
usage: flashvid viz VIDEO -o FILE (--model DIR | --clip DIR) [options]

Draw what compression keeps of a video: an HTML page to explore, or a PNG.

  -o, --output FILE     what to write, .html or .png; may be given for each
what looks at the video, a directory or a name on a model hub, one of them:
  --model DIR           a video LLM that is served: its own vision tower
  --clip DIR            a CLIP model
what is kept; the settings are the server's, without their prefix:
  --retention-ratio R   share of the tokens to keep; default: 0.25
  --token-budget B      most tokens to keep, instead
  --method METHOD       flashvid (the default), ttm, adts, tstm, evs, vidcom2,
                        visionzip, fastvid, prunevid, tome, divprune, vcast,
                        gleanvid, adaptive, uniform
  --config JSON         further settings, such as '{"alpha": 0.7}'
  --frames F            frames to sample; default: 16
  -h, --help            this text; needs pip install 'flashvid-vllm[viz]'

examples:
  flashvid viz clip.mp4 --model Qwen/Qwen2.5-VL-3B-Instruct -o kept.html
  flashvid viz clip.mp4 --clip openai/clip-vit-base-patch16 -o kept.png
"""
_WRITERS = (".html", ".png")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 where the user can put it right."""
    parser = _make_parser()
    options = parser.parse_args(argv)
    try:
        run(options)
    except UserError as error:
        parser.error(str(error))
    return 0


def run(options: argparse.Namespace) -> None:
    """Draw what the options say. Raises UserError."""
    for path in options.output:
        if path.suffix.lower() not in _WRITERS:
            raise UserError(f"-o must end in {' or '.join(_WRITERS)}, got {path}")
        if not path.parent.is_dir():
            raise UserError(f"no such folder: {path.parent}")
    if (options.model is None) == (options.clip is None):
        raise UserError(
            "give what looks at the video, --model DIR (a video LLM's directory or hub name, such as "
            "Qwen/Qwen2.5-VL-3B-Instruct) or --clip DIR (such as openai/clip-vit-base-patch16), one of them"
        )
    _config(options, {})  # a bad setting is known before anything is loaded

    from .video import read_frames

    frames = read_frames(options.video, options.frames)

    import torch

    from .features import encode_with_clip, encode_with_model
    from .scene import make_scene

    tower = str(options.model or options.clip)
    with torch.inference_mode():
        encoded = (encode_with_model if options.model else encode_with_clip)(tower, frames.pictures)
    config = _config(options, encoded.preset)
    if (options.config or {}).get(POSITIONS) == ORIGINAL:
        encoded = replace(encoded, keeps_positions=True)
    try:
        scene = make_scene(options.video.name, Path(tower).name, frames, encoded, config)
    except ValueError as error:  # a backend or a peer's parts that are not there
        raise UserError(str(error)) from None
    for path in options.output:
        try:
            _write(scene, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        kept, total = len(scene.video.size), scene.video.assignment.numel()
        print(f"{path}: {kept} of {total} tokens kept, {path.stat().st_size / 1e6:.1f} MB")


def _write(scene: Any, path: Path) -> None:
    if path.suffix.lower() == ".html":
        from .page import page

        path.write_text(page(scene), encoding="utf-8")
    else:
        from .sheet import write_sheet

        write_sheet(scene, path)


def _config(options: argparse.Namespace, preset: Any) -> FlashVidConfig:
    """The settings: defaults < preset of the family < options, as for a server. Raises UserError."""
    settings = dict(options.config or {})
    for name in SINGLE:
        value = getattr(options, name)
        if value is not None and name in settings:
            raise UserError(f"--{name.replace('_', '-')} and --config both give {name}; leave one of them out")
        if value is not None:
            settings[name] = value
    try:
        config = resolve(check_server(settings), None, preset)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config is None:
        raise UserError("enabled=false leaves every token as it is: nothing to draw")
    return config


def _make_parser() -> Parser:
    parser = Parser("flashvid viz", HELP)
    parser.add_argument("video", type=Path, metavar="VIDEO")
    parser.add_argument("-o", "--output", type=Path, action="append", required=True)
    parser.add_argument("--model")
    parser.add_argument("--clip")
    parser.add_argument("--frames", type=count, default=16)
    parser.add_argument("--retention-ratio", type=number(float))
    parser.add_argument("--token-budget", type=number(int))
    parser.add_argument("--method")
    parser.add_argument("--config", type=json_object)
    return parser


if __name__ == "__main__":
    sys.exit(main())
