"""A YAML file is read with the line of everything in it, so that a mistake has a place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from torchserve_dag.runtime.data import source
from torchserve_dag.runtime.data.source import CheckError, Problem, read


@dataclass(frozen=True)
class Part:
    size: int
    name: str = ""


@dataclass(frozen=True)
class Whole:
    version: str
    parts: list[Part] = field(default_factory=list)
    named: dict[str, Part] = field(default_factory=dict)


def problems(path: Path, text: str | bytes, kind: Any = Whole) -> list[Problem]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckError) as caught:
        read(path, kind)
    assert {p.file for p in caught.value.problems} == {str(path)}
    return caught.value.problems


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whole.yaml"


def test_a_file_is_read_with_the_lines_of_its_parts(path: Path) -> None:
    path.write_text('version: "1"\nparts:\n  - {size: 1}\n  - size: 2\n    name: b\n')

    found = read(path, Whole)

    assert found.value == Whole("1", [Part(1), Part(2, "b")])
    assert [found.line(*at) for at in ((), ("parts",), ("parts", 1), ("parts", 1, "name"))] == [1, 2, 4, 5]


def test_the_line_of_what_is_not_there_is_that_of_what_would_hold_it(path: Path) -> None:
    path.write_text('version: "1"\nparts:\n  - size: 1\n')
    found = read(path, Whole)

    assert found.line("parts", 0, "name") == 3
    assert found.line("nothing", "at", "all") == 1


def test_every_mistake_has_its_line(path: Path) -> None:
    found = problems(path, "version: 1.10\nparts:\n  - size: big\n\n  - sise: 2\nnamed:\n  a:\n    size: no\n")

    assert [(p.line, p.what) for p in found] == [
        (1, "version: 1.1 is a number where text is meant"),
        (3, "parts[0].size: expected a whole number, not 'big'"),
        (5, 'parts[1]: unknown key "sise"'),
        (5, 'parts[1]: "size" is missing'),
        (8, "named.a.size: expected a whole number, not False"),
    ]
    assert [p.help for p in found[:3]] == ["put it in quotes", "", 'did you mean "size"?']


def test_a_problem_reads_as_file_line_what_and_help() -> None:
    assert str(Problem("a.yaml", 3, "wrong", "right")) == "a.yaml:3: wrong\n  help: right"
    assert str(Problem("a.yaml", 3, "wrong")) == "a.yaml:3: wrong"


def test_a_key_that_is_written_twice_is_refused(path: Path) -> None:
    """YAML itself would keep the last one and say nothing."""
    (problem,) = problems(path, 'version: "1"\nparts: []\nversion: "2"\n')

    assert (problem.line, problem.what) == (3, '"version" is written twice')


def test_a_key_that_yaml_reads_as_something_else_has_its_line(path: Path) -> None:
    (problem,) = problems(path, 'version: "1"\nnamed:\n  a: {size: 1}\n  on: {size: 1}\n')

    assert (problem.line, problem.what) == (4, "named: the key True is not text")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "the file is empty"),
        ("# only a comment\n", 1, "the file is empty"),
        ("~\n", 1, "expected a mapping, not None"),
        ("a: 1\nb: [1,\n", 3, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: &x [*x]\n", 1, "it contains itself"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "not valid YAML"),
        ("version: 2024-13-45\n", 1, "not valid YAML"),
        (b"version: \xff\xfe\n", 1, "the file cannot be read"),
        (b"version: \x00\n", 1, "not valid YAML"),
        ("[" * 500, 1, ""),
    ],
)
def test_a_file_that_is_not_yaml_is_refused(path: Path, text: str | bytes, line: int, what: str) -> None:
    (problem,) = problems(path, text)

    assert problem.line == line
    assert what in problem.what
    assert "\n" not in problem.what


def test_a_missing_file_is_said_to_be_missing(path: Path) -> None:
    with pytest.raises(CheckError, match="there is no such file"):
        read(path, Whole)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="cannot be read"):
        source.read_plain(tmp_path)


def test_an_alias_is_read_where_it_is_used(path: Path) -> None:
    path.write_text('version: "1"\nnamed:\n  a: &a {size: 1}\n  b: *a\n')

    assert read(path, Whole).value.named == {"a": Part(1), "b": Part(1)}


def test_keys_that_are_merged_from_elsewhere_are_read(path: Path) -> None:
    path.write_text('version: "1"\nnamed:\n  first: &first {size: 1, name: one}\n  second: {<<: *first, size: 2}\n')

    assert read(path, Whole).value.named["second"] == Part(2, "one")
