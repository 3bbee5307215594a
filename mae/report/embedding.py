"""Pictures that stand in a page, so that it needs no other file."""

import base64
import os
from pathlib import Path

_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def embedded(file: Path, alternative: str) -> str:
    """An image of a PNG file; alternative is for those who do not see it, escaped."""
    content = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<img alt="{alternative}" src="data:image/png;base64,{content}"/>'


def is_whole(file: Path) -> bool:
    """Whether a PNG file is complete, which one that is being written is not."""
    if not file.is_file() or file.stat().st_size < len(_PNG) + len(_PNG_END):
        return False
    with file.open("rb") as content:
        start = content.read(len(_PNG))
        content.seek(-len(_PNG_END), os.SEEK_END)
        return (start, content.read()) == (_PNG, _PNG_END)
