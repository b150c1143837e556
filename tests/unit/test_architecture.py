"""The rules of the house, held against every import of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.imports import FLOORS, Imports, circle, room

PROTOS = "runtime/protos"

NEEDED = {"PIL", "torch", "yaml"}
"""The packages that a worker needs."""
OPTIONAL = {
    "deepspeed",
    "fsspec",
    "grpc",
    "httpx",
    "jinja2",
    "lancedb",
    "numpy",
    "onnxruntime_genai",
    "opentelemetry",
    "openvino",
    "openvino_genai",
    "packaging",
    "peft",
    "safetensors",
    "transformers",
    "xllamacpp",
}
"""The packages that the runtime imports only where an archive asks for what they do."""


@pytest.fixture(scope="module")
def imports() -> Imports:
    return Imports()


def test_the_runtime_imports_nothing_of_the_package_outside_itself(imports: Imports) -> None:
    runtime = [found for found in imports.of("runtime") if found.inside]

    assert len(runtime) > 100
    assert [found for found in runtime if not found.imported.startswith("torchserve_dag.runtime.")] == []


def test_the_runtime_imports_the_packages_on_the_list_and_no_other(imports: Imports) -> None:
    others = [found for found in imports.of("runtime") if found.third_party and room(found.module) != PROTOS]

    assert {found.imported for found in others if not found.lazy and not found.typing} == NEEDED
    assert {found.imported for found in others if found.lazy} == OPTIONAL
    assert {found.imported for found in others} == NEEDED | OPTIONAL


def test_the_generated_protos_are_optional_too(imports: Imports) -> None:
    """They import grpc and protobuf when they are imported, so the runtime imports them lazily."""
    inside = [found for found in imports.of("runtime") if room(found.imported) == PROTOS != room(found.module)]

    assert {found.imported for found in imports.of(PROTOS) if found.third_party} == {"google", "grpc"}
    assert inside
    assert all(found.lazy for found in inside)


def test_every_room_has_its_floor(imports: Imports) -> None:
    assert imports.rooms == {name for floor in FLOORS for name in floor}


def test_every_arrow_goes_down(imports: Imports) -> None:
    assert len(imports.arrows) > 50
    assert imports.upwards == []


def test_no_modules_import_each_other_in_a_circle(imports: Imports) -> None:
    assert imports.circle() == []
    assert imports.circle(of_rooms=True) == []


def test_a_service_knows_no_server(imports: Imports) -> None:
    """Of the worker's room, only TorchServe's own folder knows TorchServe's loops."""
    loops = "torchserve_dag.runtime.worker.torchserve"
    importing = {found.module for found in imports.all if f"{found.imported}.".startswith(f"{loops}.")}

    assert len(importing) >= 3
    assert {module for module in importing if not module.startswith(f"{loops}.")} == set()


def test_the_direct_host_uses_nothing_of_an_archive_but_the_protocol(imports: Imports) -> None:
    """TorchServe's archives have no copy of the runtime. What serves them is imported for them only."""
    theirs = "torchserve_dag.direct.torchserve_archive"
    inside = {found.imported for found in imports.of("direct") if found.inside and not found.module.startswith(theirs)}

    assert {name for name in inside if not name.startswith("torchserve_dag.direct.")} == {
        "torchserve_dag.runtime.worker.protocol",
        "torchserve_dag.runtime.worker.service",  # its `load`
        "torchserve_dag.runtime.protos.inference_pb2",  # TorchServe's own messages, which do not change any more
    }
    assert [found for found in imports.all if found.imported.startswith(theirs) and not found.lazy] == [
        found for found in imports.of("direct") if found.imported.startswith(theirs) and found.module.startswith(theirs)
    ]


def test_the_engine_knows_no_server(imports: Imports) -> None:
    inside = {found.imported for found in imports.of("runtime/engine") if found.inside}

    assert {name for name in inside if "torchserve" in name.removeprefix("torchserve_dag")} == set()


IN_DIFFERENT_PROTOCOLS = {"Context"}
"""TorchServe's context, as its loop uses it and as an unedited handler sees it."""


def test_a_class_has_a_name_of_its_own(imports: Imports) -> None:
    """But for generated code, templates, which are users' code, and classes that are private to a module."""
    homes: dict[str, set[str]] = {}
    for module, path in imports.modules.items():
        if room(module) not in {PROTOS, "templates"}:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, set()).add(module)

    assert {name: modules for name, modules in homes.items() if len(modules) > 1}.keys() == IN_DIFFERENT_PROTOCOLS


def test_an_import_upwards_is_seen(tmp_path: Path) -> None:
    """Whatever form it has: in a function, for types only, relative, or as a string that is run with `-m`."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "call.py").touch()
    (tmp_path / "runtime" / "messages.py").write_text("""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from torchserve_dag.commands import call
def lazy():
    import torchserve_dag.commands.call
    from ..commands import call
COMMAND = ["python", "-m", "torchserve_dag.commands.call"]
""")
    found = [(one.line, one.lazy, one.typing) for one in Imports(tmp_path).upwards]

    assert found == [(4, False, True), (6, True, False), (7, True, False), (8, True, False)]


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (list("abca"), list("bcab"), list("cabc"))
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
