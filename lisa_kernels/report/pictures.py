"""What a model draws: the picture that a run left, within the page."""

from __future__ import annotations

import base64

from lisa_kernels.report.record import Run

PICTURE_FILE = "samples.png"
# A page is to be sent by mail.
_MOST_BYTES = 4 << 20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def section(run: Run) -> str:
    """Return the picture; "" of a run that left none, and of a file that is none or is too large."""
    path = run.folder / PICTURE_FILE
    try:
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= _MOST_BYTES else b""
    except OSError:
        return ""
    if not content.startswith(_SIGNATURE):
        return ""
    source = base64.b64encode(content).decode()
    note = '<p class="note">A row for each class, its images from one noise; without guidance.</p>'
    return f'{note}<img class="picture" alt="Images that the model drew" src="data:image/png;base64,{source}">'
