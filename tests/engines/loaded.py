"""An engine with a model that a test has made below a folder of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchserve_dag import LanguageSettings, Placement
from torchserve_dag.runtime.models.language.engine import LanguageEngine
from torchserve_dag.runtime.models.language.engines import load_engine


@contextmanager
def loaded(weights: Path, model: str, engine: Any, **settings: Any) -> Iterator[LanguageEngine]:
    """The engine, in float32 on the CPU, until the end of the block."""
    chosen = LanguageSettings(model, engine=engine, exact=True, **settings)
    loaded = load_engine(weights, chosen, Placement(torch.device("cpu")))
    try:
        yield loaded
    finally:
        loaded.close()
