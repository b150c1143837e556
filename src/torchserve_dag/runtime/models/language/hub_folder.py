"""A model's folder as hubs have it: where it is, and how long a text it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.models.language.settings import LanguageSettings

LONGEST = 8_192
"""The longest context without a setting, in tokens."""


def hub_folder(folder: Path, settings: LanguageSettings) -> Path:
    """The folder of the model that the settings name, below `folder`. Raises ValueError."""
    model = folder / settings.model
    if not (model / "config.json").is_file():
        raise ValueError(f"{settings.model}: there is no such folder with a model's config.json below the weights")
    return model


def hub_context(model: Path, settings: LanguageSettings) -> int:
    """The most tokens of a prompt and its answer. Raises ValueError."""
    trained: int | None = hub_config(model).get("max_position_embeddings")
    if settings.context and trained and settings.context > trained:
        raise ValueError(f"context is {settings.context:,}: {settings.model} was trained with {trained:,} tokens")
    return settings.context or min(trained or LONGEST, LONGEST)


def hub_config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text("utf-8"))
    return config


def refuse_settings(settings: LanguageSettings, *names: str) -> None:
    """Raises ValueError for a setting that is given, and that the engine has not."""
    for name in names:
        if getattr(settings, name):
            raise ValueError(f"{name}: the engine {settings.engine} has none")
