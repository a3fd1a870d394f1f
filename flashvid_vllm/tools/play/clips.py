# SPDX-License-Identifier: MIT
"""The clips that can be asked about: samples from a folder, and a few uploaded ones in a temporary folder."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

MIB = 2**20
HELD = 4  # uploaded clips; the oldest goes when another comes
MOST_SAMPLES = 50
LONGEST_NAME = 200
# What a file's name may end in, and the type it is sent as: never one that a browser would run.
TYPES = {
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".avi": "video/x-msvideo", ".mpg": "video/mpeg", ".mpeg": "video/mpeg",
    ".ogv": "video/ogg", ".gif": "image/gif",
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A video file.

    Attributes:
        id: how the page names it; never derived from its name.
        name: as the user knows it. Anything may stand in it.
        path: where it lies.
        sample: whether it is the user's own file, which is never removed.
    """

    id: str
    name: str
    path: Path
    sample: bool

    @property
    def type(self) -> str:
        """Its media type."""
        return TYPES[self.path.suffix.lower()]

    def describe(self) -> dict[str, str | int | bool]:
        """What the page is told."""
        size = self.path.stat().st_size
        return {"id": self.id, "name": self.name, "type": self.type, "bytes": size, "sample": self.sample}


class Shelf:
    """Clips by their id.

    Args:
        folder: a temporary one, for uploads.
        most_bytes: of one clip, uploaded or not: it is sent to the model's server as a whole.
        samples: the user's files.
    """

    def __init__(self, folder: Path, most_bytes: int, samples: list[Path]) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.samples = {clip.id: clip for clip in (Clip(secrets.token_hex(8), name_of(p), p, True) for p in samples)}
        self.uploads: dict[str, Clip] = {}  # the oldest first
        self._one_at_a_time = asyncio.Lock()  # so that uploads in the making are bounded, too

    def list_samples(self) -> list[dict[str, str | int | bool]]:
        """The samples that are still there."""
        return [clip.describe() for clip in self.samples.values() if clip.path.is_file()]

    def get(self, id: str) -> Clip:
        """The clip ``id``. Raises UserError if it is not held any more, or too large."""
        clip = self.samples.get(id) or self.uploads.get(id)
        if clip is None or not clip.path.is_file():
            raise UserError(f"this clip is no longer here (the last {HELD} are held): choose it again", 404)
        if clip.path.stat().st_size > self.most_bytes:
            raise UserError(f"{clip.name} has {self.too_large(clip.path.stat().st_size)}", 413)
        return clip

    def too_large(self, size: int) -> str:
        """That ``size`` bytes are too many, and what to do."""
        return (
            f"{size / MIB:.4g} MiB, and at most {self.most_bytes / MIB:.4g} MiB are taken: "
            "cut it shorter, or start flashvid play with a larger --max-upload-mib"
        )

    async def add(self, name: str, length: int | None, chunks: AsyncIterator[bytes]) -> Clip:
        """Keep an upload of ``length`` bytes, if that was told. Raises UserError for what is not taken."""
        suffix = Path(name).suffix.lower()
        if suffix not in TYPES:
            raise UserError(f"{name[:LONGEST_NAME]!r} is not taken for a video: its name must end in {known()}", 415)
        if length is not None and length > self.most_bytes:
            raise UserError(f"{name[:LONGEST_NAME]} has {self.too_large(length)}", 413)
        id = secrets.token_hex(8)
        path = self.folder / f"{id}{suffix}"
        async with self._one_at_a_time:
            try:
                await self._write(path, name, chunks)
            except BaseException:  # a closed tab cancels
                path.unlink(missing_ok=True)
                raise
            clip = self.uploads[id] = Clip(id, name[:LONGEST_NAME], path, False)
            for old in list(self.uploads)[:-HELD]:
                self.uploads.pop(old).path.unlink(missing_ok=True)
        return clip

    async def _write(self, path: Path, name: str, chunks: AsyncIterator[bytes]) -> None:
        size = 0
        with path.open("xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > self.most_bytes:
                    raise UserError(f"{name[:LONGEST_NAME]} has more than {self.too_large(self.most_bytes)}", 413)
                file.write(chunk)
        if not size:
            raise UserError(f"{name[:LONGEST_NAME]} is empty")


def name_of(path: Path) -> str:
    """A file's name as text: it may hold bytes that are none, which no answer could carry."""
    return path.name.encode("utf-8", "replace").decode()


def find_samples(folder: Path) -> list[Path]:
    """The videos in ``folder`` by name, the first MOST_SAMPLES. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"--samples {folder}: no such folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TYPES and path.is_file())
    if not found:
        raise UserError(f"--samples {folder}: no file there ends in {known()}")
    return found[:MOST_SAMPLES]


def known() -> str:
    """The endings that are taken."""
    return ", ".join(TYPES)
