"""Rows with pictures, video or sound: named, because Talik trains text only."""

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
    """Raises RowError for a row with a column of pictures, video or sound that is not empty."""
    for name, value in fields.items():
        kind = COLUMNS.get(name.lower())
        if kind is not None and value not in (None, "", [], {}):
            raise media(kind, name)


def media(kind: str, field: str) -> RowError:
    """The error for a row with pictures, video, sound or files."""
    return RowError(MEDIA, f"the row has {kind} (field '{field}'), and Talik trains text only", field)
