"""A comparison with a number, like `p99 > 1.3x` or `recall >= .8`: what conditions on the command line are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Operator = Literal[">", ">=", "<", "<="]

_GRAMMAR = re.compile(
    r"(?P<what>\w[\w@:.]*) *(?P<operator>[<>]=?) *(?P<number>\d+(?:\.\d+)?|\.\d+) *(?P<unit>%|x|ms|s|)"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Its parts as they are written."""

    what: str
    operator: Operator
    number: float
    unit: str
    """`%`, `x`, `ms`, `s`, or nothing."""

    @classmethod
    def read(cls, text: str) -> Comparison | None:
        """None for a text that is no comparison."""
        match = _GRAMMAR.fullmatch(text.strip())
        if not match:
            return None
        operator: Operator = match["operator"]  # type: ignore[assignment]  # the grammar has no others
        return cls(match["what"], operator, float(match["number"]), match["unit"])

    def holds(self, value: float, number: float) -> bool:
        """Whether it holds of a value; `number` is the comparison's own in the unit of the value."""
        match self.operator:
            case ">":
                return value > number
            case ">=":
                return value >= number
            case "<":
                return value < number
            case "<=":
                return value <= number
