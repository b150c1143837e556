"""The table of engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchserve_dag.runtime.compute.placement import Placement
from torchserve_dag.runtime.models.language import engines
from torchserve_dag.runtime.models.language.engines import ENGINES, EngineEntry, load_engine
from torchserve_dag.runtime.models.language.settings import LanguageSettings


def test_an_engine_whose_package_is_missing_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EngineEntry("openvino.engine", "no_such_package", "pip install it")
    monkeypatch.setitem(ENGINES, "openvino", entry)

    with pytest.raises(ImportError, match="needs the package no_such_package: run pip install it"):
        load_engine(Path(), LanguageSettings("m", engine="openvino"), Placement(torch.device("cpu")))


@pytest.mark.parametrize("entry", ENGINES.values(), ids=ENGINES)
def test_every_engine_has_its_module(entry: EngineEntry) -> None:
    path = Path(engines.__file__).parent.joinpath(*entry.module.split(".")).with_suffix(".py")

    assert "\ndef load(" in path.read_text("utf-8")
