"""What the load tests send, photos with no object, one, and many, and to which server.

It is this project's, or that of the project in the environment variable TORCHSERVE_DAG_PROJECT.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from torchserve_dag.server.state import State

ROOT = Path(__file__).resolve().parent.parent
STATE = State(Path(os.environ.get("TORCHSERVE_DAG_PROJECT", ROOT)))
WORKFLOW = "detect_classify"
PHOTOS = {
    "none": (ROOT / "photos" / "empty.jpg").read_bytes(),
    "one": (ROOT / "photos" / "coffee.jpg").read_bytes(),
    "many": (ROOT / "photos" / "many.jpg").read_bytes(),
}


def any_photo() -> tuple[str, bytes]:
    """How many objects the photo has, and the photo."""
    return random.choice(list(PHOTOS.items()))
