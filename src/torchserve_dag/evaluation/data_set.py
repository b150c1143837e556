"""A data set: JSON lines of an input and of what is expected, checked line by line, and never in memory as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchserve_dag.runtime.data import plain, strict_json
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.project.weight_files import sha256

MAX_LINE = 16 * 2**20
"""In bytes. A photo or a long document is a file of its own, which a line names."""
MOST_PROBLEMS = 20
"""So many mistakes are named before the rest of a file is left unread."""
FILE = "file"
"""`{"file": "photo.jpg"}` stands for the file's content."""
KEYS = ("input", "expected", "id")

CheckExpected = Callable[[Any], str | None]
"""Says what is wrong with what a line expects, or None."""


@dataclass(frozen=True, slots=True)
class DataItem:
    """A line of a data set."""

    line: int
    id: str
    """As the line says it; else its number."""
    input: Any
    """Plain data, in which a Path stands for a file's content."""
    expected: Any


@dataclass(frozen=True, slots=True)
class DataSet:
    """A file of items that was checked."""

    path: Path
    items: int
    hash: str
    """Of the file, and of all files that its lines name."""

    @classmethod
    def read(cls, path: Path, checks: tuple[CheckExpected, ...] = ()) -> DataSet:
        """Read and check the file. Raises CheckError with each wrong line, and OSError if it cannot be read."""
        digest, count = hashlib.sha256(), 0
        problems: list[Problem] = []
        with path.open("rb") as stream:
            for number, line in _lines(stream, path):
                digest.update(line)
                try:
                    item = _item(line, number, path.parent)
                    for file in files_in(item.input):
                        digest.update(_digest(file))
                except _WrongLineError as error:
                    problems.append(Problem(str(path), number, str(error), error.help))
                else:
                    count += 1
                    wrong = next(filter(None, (check(item.expected) for check in checks)), None)
                    if wrong:
                        problems.append(Problem(str(path), number, wrong))
                if len(problems) == MOST_PROBLEMS:
                    break
        if not count and not problems:
            problems.append(Problem(str(path), 1, "it has no item", 'write {"input": …, "expected": …} in each line'))
        if problems:
            raise CheckError(problems)
        return cls(path, count, digest.hexdigest()[:12])

    def __iter__(self) -> Iterator[DataItem]:
        """The items, one after the other from the file."""
        with self.path.open("rb") as stream:
            for number, line in _lines(stream, self.path):
                yield _item(line, number, self.path.parent)


def files_in(value: Any) -> list[Path]:
    """The files that an item's input names: it is one, or some of its fields are."""
    parts = value.values() if isinstance(value, dict) else (value,)
    return [part for part in parts if isinstance(part, Path)]


class _WrongLineError(Exception):
    def __init__(self, what: str, help: str = "") -> None:  # noqa: A002 (the word that is printed)
        super().__init__(what)
        self.help = help


def _digest(file: Path) -> bytes:
    """Raises _WrongLineError."""
    if not file.is_file():
        raise _WrongLineError(f"there is no file {file}", "name it as it lies beside the data")
    try:
        return sha256(file).encode()
    except OSError as error:
        raise _WrongLineError(f"{file} cannot be read: {error.strerror or error}") from None


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            what, help_ = f"the line has more than {MAX_LINE:,} bytes", 'put the input into a file: {"file": "NAME"}'
            raise CheckError([Problem(str(path), number, what, help_)])
        if line.strip():
            yield number, line


def _item(line: bytes, number: int, folder: Path) -> DataItem:
    """Raises _WrongLineError."""
    try:
        fields = strict_json.parse(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _WrongLineError("the line is not UTF-8") from None
    except ValueError as error:
        raise _WrongLineError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _WrongLineError("the line is no object", 'write {"input": …, "expected": …}')
    for key in fields:
        if key not in KEYS:
            raise _WrongLineError(f'unknown key "{key}"', plain.did_you_mean(key, list(KEYS)))
    for key in ("input", "expected"):
        if key not in fields:
            raise _WrongLineError(f'"{key}" is missing')
    name = fields.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise _WrongLineError(f"the id {json.dumps(name)[:40]} is neither text nor a whole number")
    return DataItem(number, str(name), _with_files(fields["input"], folder), fields["expected"])


def _with_files(value: Any, folder: Path) -> Any:
    """The input with a Path in place of each `{"file": …}`: as a whole, or as a field of it."""
    if not isinstance(value, dict):
        return value
    if _is_file(value):
        return folder / value[FILE]
    return {name: folder / part[FILE] if _is_file(part) else part for name, part in value.items()}


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {FILE} and isinstance(value[FILE], str)
