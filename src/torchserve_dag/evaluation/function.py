"""A scorer of the project's own: a function of an answer and of what was expected, in a Python file of the project."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchserve_dag.evaluation.scorers import ScoreError
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.project.modules import Modules


class FunctionScorer:
    """Calls the function with both as the types that it declares: dataclasses are made of JSON."""

    def __init__(self, root: Path, file: Path, name: str) -> None:
        """`file` is in the project. Raises CheckError if the function cannot score."""
        self.name = name
        module = Modules.of(root).load(file)
        function = vars(module).get(name)
        if not inspect.isfunction(function):
            known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            raise CheckError([Problem(str(file), 1, f'there is no function "{name}"', plain.did_you_mean(name, known))])
        line = function.__code__.co_firstlineno
        try:
            self._answer, self._expected = _types(function)
        except (NameError, TypeError, AttributeError) as error:
            help_ = "declare it like: def score(answer: str, expected: list[str]) -> float"
            raise CheckError([Problem(str(file), line, f"{name}: {error}", help_)]) from None
        self._function: Callable[[Any, Any], float | bool] = function

    def check(self, expected: Any) -> str | None:
        try:
            plain.build(self._expected, expected)
        except plain.WrongDataError as error:
            return f"{self.name} expects {plain.name_of(self._expected)}: {error}"
        return None

    def score(self, answer: Any, expected: Any) -> float:
        try:
            given = answer if _is(answer, self._answer) else plain.build(self._answer, answer)
        except plain.WrongDataError as error:
            raise ScoreError(f"the answer is no {plain.name_of(self._answer)}: {error}") from None
        try:
            value = self._function(given, plain.build(self._expected, expected))
        except Exception as error:  # noqa: BLE001 (the function is the user's)
            raise ScoreError(f"{self.name} raised {type(error).__name__}: {error}") from None
        number = plain.scalar(value)
        if not isinstance(number, bool | int | float) or not math.isfinite(number) or not 0 <= number <= 1:
            raise ScoreError(f"{self.name} gave {value!r:.60}, and a score is 0 to 1, or true or false")
        return float(number)


def _types(function: Callable[..., Any]) -> tuple[Any, Any]:
    """What the function takes. Raises TypeError, or what its annotations raise."""
    names = list(inspect.signature(function).parameters)
    if len(names) != 2:  # noqa: PLR2004
        raise TypeError(f"it takes {len(names)} values, where two are given: the answer, and what is expected")
    hints = typing.get_type_hints(function)
    for name in (*names, "return"):
        if name not in hints:
            raise TypeError(f"the type of {'what it gives' if name == 'return' else name} is not declared")
    if hints["return"] not in {float, bool}:
        raise TypeError(f"it gives {plain.name_of(hints['return'])}, and a score is float or bool")
    return hints[names[0]], hints[names[1]]


def _is(answer: Any, kind: Any) -> bool:
    return isinstance(kind, type) and isinstance(answer, kind)
