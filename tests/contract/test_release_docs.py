"""The pages on releases, experiments and what is exposed say what there is: commands, files, fields of the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.conftest import ROOT
from torchserve_dag.commands.release import STOP_IF
from torchserve_dag.front_door.bootstrap import bootstrap
from torchserve_dag.front_door.routes_file import Routes
from torchserve_dag.front_door.settings import FrontDoor
from torchserve_dag.runtime.data import plain

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("releasing", "experiments", "exposed")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_files_are_right(page: Path) -> None:
    for kind, text in BLOCK.findall(page.read_text("utf-8")):
        if kind == "yaml":
            kinds: dict[str, Any] = {"# routes.yaml": Routes, "# front_door.yaml": FrontDoor}
            found = kinds.get(text.partition("\n")[0])
            assert plain.build(found, yaml.safe_load(text)) if found else yaml.safe_load(text)


def test_the_default_reason_is_the_one_that_is_shown() -> None:
    assert STOP_IF in (ROOT / "docs" / "releasing.md").read_text("utf-8")


def test_every_field_of_the_log_is_named() -> None:
    """All but those of sizes and Envoy's own."""
    text = (ROOT / "docs" / "exposed.md").read_text("utf-8")
    listener = bootstrap(FrontDoor(), Path("/folder"), Path("/logs"), "{}", 1)["static_resources"]["listeners"][0]
    http = listener["filter_chains"][0]["filters"][0]["typed_config"]
    fields = http["access_log"][0]["typed_config"]["log_format"]["json_format"]
    own = {"received_bytes", "sent_bytes", "flags", "details", "cancels", "protocol", "method", "path", "grpc_failure"}

    assert [name for name in fields if name not in own and f"`{name}`" not in text] == []


def test_the_routes_of_the_readme_are_right() -> None:
    assert plain.build(Routes, yaml.safe_load((ROOT / "docs" / "routes.yaml").read_text("utf-8")))
