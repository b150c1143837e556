"""The project that random workflows are written into."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.property.functions import FUNCTIONS_FILE, HANDLERS, handler_files


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    (root / "handlers").mkdir()
    (root / "workflows").mkdir()
    (root / "workflows" / "functions.py").write_text(FUNCTIONS_FILE)
    for name, op in HANDLERS.items():
        code, file = handler_files(op)
        (root / "handlers" / f"{name}.py").write_text(code)
        (root / "handlers" / f"{name}.yaml").write_text(file)
    return root


@pytest.fixture(autouse=True)
def _quickly_and_quietly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses before retries are short, and failures are not logged."""
    monkeypatch.setattr("torchserve_dag.runtime.engine.outcome.FIRST_PAUSE_S", 0.001)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
