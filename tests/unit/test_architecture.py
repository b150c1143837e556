"""The rules of the house, held against every import of the package."""

from __future__ import annotations

import pytest

from tests.imports import FLOORS, Imports, circle, room

PROTOS = "runtime/protos"

NEEDED = {"PIL", "torch", "yaml"}
"""The packages that a worker needs."""
OPTIONAL = {"grpc", "openvino", "opentelemetry"}
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


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (list("abca"), list("bcab"), list("cabc"))
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
