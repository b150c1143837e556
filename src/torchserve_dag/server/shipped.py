"""Files of the repository that the wheel carries too: `config.properties`, `log4j2.xml`, ready handlers.

They have one source, the repository; `pyproject.toml` lists those that the build copies into the wheel.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """Where a file or folder of the repository is: in the wheel's `shipped/`, or in the clone itself."""
    in_wheel = _PACKAGE / "shipped"
    return (in_wheel if in_wheel.is_dir() else _PACKAGE.parents[1]) / path


def ready_handlers() -> list[str]:
    """The names of the handlers that serve published models, whichever their settings name."""
    return [
        "passage_search",
        "text_classifier",
        "text_embedding",
        "text_generation",
        "text_moderation",
        "transformers_classifier",
        "transformers_detector",
    ]
