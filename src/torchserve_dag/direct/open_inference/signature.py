"""A model's message as input tensors and its answer as output tensors, by the `takes` and `answers` of `build.json`.

The form of both is that of `archives/signature.py`. The first dimension of every tensor is the requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from torchserve_dag.direct.open_inference.tensors import BYTES, FLOATING, WHOLE, InferenceError, TensorInfo, quoted

INPUT, OUTPUT = "input", "output"
"""The tensor of a message that is one value, and of an answer that is one."""
_DATATYPES = {"bool": "BOOL", "int": "INT64", "float": "FP64"}
_ACCEPTED = {"BOOL": ("BOOL",), "INT64": WHOLE, "FP64": (*FLOATING, *WHOLE), BYTES: (BYTES,)}
_LIST = "list["


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What a tensor's elements are."""

    of: str
    """photo, text, bytes, bool, int, float, str or json."""
    depth: int = 0
    """How many levels of lists of them a request has: dimensions beside the first."""

    @classmethod
    def named(cls, name: str) -> TensorKind:
        """`list[list[float]]` for example."""
        depth = name.count(_LIST)
        return cls(name[depth * len(_LIST) : len(name) - depth], depth)

    @property
    def datatype(self) -> str:
        return _DATATYPES.get(self.of, BYTES)

    @property
    def accepted(self) -> Sequence[str]:
        """The datatypes that an input may have."""
        return _ACCEPTED[self.datatype]

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, self.datatype, (-1,) * (1 + self.depth))


@dataclass(frozen=True, slots=True)
class Message:
    """What a model takes, or what it answers."""

    tensors: Mapping[str, TensorKind]
    one_value: bool
    """Whether the message is one value, whose tensor is called INPUT or OUTPUT, and has no fields."""
    optional: frozenset[str] = frozenset()

    @classmethod
    def read(cls, said: Mapping[str, Any], name_of_one: str) -> Message:
        if "value" in said:
            return cls({name_of_one: TensorKind.named(said["value"])}, one_value=True)
        fields = {name: TensorKind.named(kind) for name, kind in said["fields"].items()}
        return cls(fields, one_value=False, optional=frozenset(said.get("optional", ())))

    def infos(self) -> list[TensorInfo]:
        return [kind.info(name) for name, kind in self.tensors.items()]


@dataclass(frozen=True, slots=True)
class ModelSignature:
    takes: Message
    answers: Message

    @classmethod
    def read(cls, build: Mapping[str, Any]) -> ModelSignature:
        """The signature in an archive's `build.json`. Raises InferenceError for an archive that has none."""
        if "takes" not in build or "answers" not in build:
            what = "its archive does not say what it takes: build it again under a new version"
            raise InferenceError(f"{build.get('name')} has no tensors, for {what}.", HTTPStatus.NOT_IMPLEMENTED)
        return cls(Message.read(build["takes"], INPUT), Message.read(build["answers"], OUTPUT))

    def outputs(self, asked: Sequence[str]) -> Sequence[str]:
        """The outputs to answer with: those that were asked for, or all. Raises InferenceError."""
        known = self.answers.tensors
        for name in asked:
            if name not in known:
                raise InferenceError(f"There is no output {quoted(name)}: the outputs are {', '.join(known)}.")
        return list(dict.fromkeys(asked)) or list(known)
