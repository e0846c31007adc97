"""Recognises rows with images, video or audio, which Talik cannot train on: it trains text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talik.data.reading.rows import RowError

MEDIA = "media"
COLUMNS = {
    **dict.fromkeys(
        ("image", "images", "image_url", "image_urls", "image_path", "picture", "pictures"), "images"
    ),
    **dict.fromkeys(("video", "videos", "video_path"), "video"),
    **dict.fromkeys(("audio", "audios", "audio_path", "speech"), "audio"),
}
PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image", "picture"), "images"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("file", "input_file", "document"), "files"),
}


def check_media(fields: Mapping[str, Any]) -> None:
    """Checks that all columns of images, video and audio are empty.

    Raises:
        RowError: One of them is not empty.
    """
    for name, value in fields.items():
        kind = COLUMNS.get(name.lower())
        if kind is not None and value not in (None, "", [], {}):
            raise media_error(kind, name)


def media_error(kind: str, field: str) -> RowError:
    """Returns the error for a row with images, video, audio or files."""
    return RowError(MEDIA, f"the row has {kind} (field '{field}'), and Talik trains text only", field)
