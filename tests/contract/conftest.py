"""The project's own handlers, loaded once; and a project whose hub models are made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_models import write_hub_project
from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import Photo
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.models.stages import Stages
from torchserve_dag.runtime.project.folders import Project

ROOT = Path(__file__).parents[2]
Load = Callable[[str], Stages]
"""A handler's name → the handler, loaded once."""


@pytest.fixture(scope="session")
def project() -> Project:
    """The project itself, with the weights that `scripts/weights` brings."""
    if not (ROOT / "weights/photos/motorcycle.jpg").is_file():
        pytest.fail("The demo's weights are not there; run scripts/weights first.", pytrace=False)
    return Project(ROOT)


@pytest.fixture(scope="session")
def load(project: Project, hub_project: Project) -> Load:
    """Any handler of the project: those of hub models with small random models in place of theirs."""

    @cache
    def loaded(name: str) -> Stages:
        home = hub_project if hub_project.find("handlers", name) else project
        return load_handler(home, home.handler(name), device="cpu")

    return loaded


@pytest.fixture(scope="session")
def photo() -> Callable[[str], Photo]:
    """A photo by its name: those of `photos/`, and the one that `scripts/weights` brings."""

    @cache
    def read(name: str) -> Photo:
        folder = ROOT / "photos" if (ROOT / "photos" / name).is_file() else ROOT / "weights/photos"
        return codec.decode(Photo, (folder / name).read_bytes())

    return read


@pytest.fixture(scope="session")
def hub_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The handlers of hub models as they are, each set to a small random model of the kind it is for."""
    return Project(write_hub_project(tmp_path_factory.mktemp("hub_project")))
