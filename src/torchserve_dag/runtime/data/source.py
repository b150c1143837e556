"""A checked YAML file: read into a typed value, every mistake named by file and line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from torchserve_dag.runtime.data import plain

T = TypeVar("T")

MAX_BYTES = 2**20
MAX_PARTS = 50_000
"""Keys and values of a file, with its aliases written out: ten lines of aliases to aliases may stand for billions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what it is, and what to write instead."""

    file: str
    line: int
    what: str
    help: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}: {self.what}"
        return f"{text}\n  help: {self.help}" if self.help else text


class CheckError(Exception):
    """Files were refused before anything ran; `problems` has every mistake."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Source(Generic[T]):
    """A file's content, with the line of each part."""

    path: Path
    value: T
    lines: dict[plain.Path, int]

    def line(self, *path: str | int) -> int:
        """The line of the deepest part of `path` that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: plain.Path, what: str, help: str = "") -> Problem:  # noqa: A002 (the word that is printed)
        return Problem(str(self.path), self.line(*path), what, help)


def read(path: Path, kind: type[T]) -> Source[T]:
    """The YAML file at `path` as a `kind`. Raises CheckError."""
    data, lines = read_plain(path)
    source = Source(path, data, lines)
    try:
        return Source(path, plain.build(kind, data), lines)
    except plain.WrongDataError as error:
        raise CheckError([source.problem(w.path, _sentence(w), w.help) for w in error.wrongs]) from None


def read_plain(path: Path) -> tuple[Any, dict[plain.Path, int]]:
    """The YAML file at `path` as plain data, with the line of every key and value."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckError(
                [Problem(str(path), 1, f"the file has {size:,} bytes, and at most {MAX_BYTES:,} are read")]
            )
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise CheckError([Problem(str(path), 1, "there is no such file")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError([Problem(str(path), 1, f"the file cannot be read: {error}")]) from None
    try:
        root = _compose(text)
        lines: dict[plain.Path, int] = {}
        if root is None:
            raise CheckError([Problem(str(path), 1, "the file is empty")])
        wrong: list[Problem] = []
        _lines(root, (), lines, wrong, str(path))
        if wrong:
            raise CheckError(wrong)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise CheckError([Problem(str(path), mark.line + 1 if mark else 1, f"not valid YAML: {what}")]) from None
    except ValueError as error:  # an impossible date or number
        raise CheckError([Problem(str(path), 1, f"not valid YAML: {error}")]) from None
    except RecursionError:
        raise CheckError([Problem(str(path), 1, "it contains itself, or is nested too deeply")]) from None


def _sentence(wrong: plain.Wrong) -> str:
    where = wrong.path[:-1] if wrong.at_key else wrong.path
    return f"{plain.dotted(where)}: {wrong.what}" if where else wrong.what


def load(text: str) -> Any:
    """The plain data of a YAML text. Raises yaml.YAMLError, ValueError, RecursionError."""
    _compose(text)
    return yaml.safe_load(text)


def _compose(text: str) -> yaml.Node | None:
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    if root and _parts(root, {}) > MAX_PARTS:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_PARTS:,} keys and values")
    return root


def _parts(node: yaml.Node, known: dict[int, int]) -> int:
    """How many keys and values a node stands for, its aliases and merges written out."""
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_parts(child, known) for child in flat)
    return known[id(node)]


def _lines(node: yaml.Node, path: plain.Path, lines: dict[plain.Path, int], wrong: list[Problem], file: str) -> None:
    """Collect the line of each part, and what is wrong in any file: a key twice, a number that is not finite."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # `<<: *other` adds keys that are written elsewhere
                continue
            name = _key(key)
            line = key.start_mark.line + 1
            if name in seen:  # YAML keeps the last one silently
                wrong.append(Problem(file, line, f'"{name}" is written twice', "keep one"))
            seen.add(name)
            inside = (*path, name)
            lines[inside] = line
            _lines(value, inside, lines, wrong, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), lines, wrong, file)
    elif isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:float" and not math.isfinite(_key(node)):
        what = f"{plain.dotted(path)}: {node.value} is not a finite number"
        wrong.append(Problem(file, node.start_mark.line + 1, what))


def _key(node: yaml.Node) -> Any:
    """A mapping's key as in the parsed data, where `on:` is True."""
    return yaml.SafeLoader("").construct_object(node) if isinstance(node, yaml.ScalarNode) else str(node.value)
