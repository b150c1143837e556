"""What the load tests send: photos with no object, one, and many, and where the server is."""

from __future__ import annotations

import random
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = "detect_classify"
PHOTOS = {
    "none": (ROOT / "photos" / "empty.jpg").read_bytes(),
    "one": (ROOT / "photos" / "coffee.jpg").read_bytes(),
    "many": (ROOT / "photos" / "many.jpg").read_bytes(),
}


def any_photo() -> tuple[str, bytes]:
    """How many objects the photo has, and the photo."""
    return random.choice(list(PHOTOS.items()))
