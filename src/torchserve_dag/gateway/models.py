"""The models of `/v1`: those served models that take chats, prompts, or texts to embed or to judge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.front_door.tokens import Token
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

Kind = Literal["chat", "completion", "embedding", "moderation"]
CALLS: Mapping[str, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "moderation": "/v1/moderations",
}
_ASKED = re.compile(r"([\w.-]{1,128})(?:/([\w.+-]{1,64}))?(?::([\w./-]{1,128}))?", re.ASCII)
_AGAIN = {"retry-after": "1"}


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a client calls a model: `NAME`, `NAME/VERSION`, with `:ADAPTER` of a LoRA."""

    name: str
    version: str | None = None
    adapter: str | None = None

    @property
    def path(self) -> str:
        return "/predictions/" + "/".join(filter(None, (self.name, self.version)))

    def answered_by(self, version: str) -> str:
        """The model's name with the version that answered."""
        return f"{self.name}/{version}" + (f":{self.adapter}" if self.adapter else "")


class Models:
    """What the front door serves, read again whenever it changes."""

    def __init__(self, state: State) -> None:
        self._state, self._door = state, Door(state)
        self._stamp: tuple[int, int] | None = None
        self._served: Sequence[ServedVersion] = ()
        self.sees_clients_leave = False
        """Whether the host knows when a caller has closed its connection: TorchServe does not."""

    def find(self, asked: str, kind: Kind, token: Token | None) -> ModelName:
        """The model that a request names. Raises ApiError."""
        found, versions = self._found(asked, token)
        if not any(kind in one.language for one in versions):
            calls = " and ".join(CALLS[name] for name in versions[0].language)
            message = f"{found.name} is called at {calls}, not at {CALLS[kind]}."
            raise ApiError(HTTPStatus.BAD_REQUEST, message, param="model")
        return found

    def only(self, kind: Kind, token: Token | None) -> str:
        """The one model of a kind that a token may call, for a request that names none. Raises ApiError."""
        self._read()
        of_kind = {one.model for one in self._served if kind in one.language and may_call(token, one.model)}
        if len(of_kind) != 1:
            which = f"write one of {', '.join(sorted(of_kind))}" if of_kind else f"none is served for {CALLS[kind]}"
            raise ApiError(HTTPStatus.BAD_REQUEST, f"model: it is missing; {which}.", param="model")
        return of_kind.pop()

    def described(self, asked: str, token: Token | None) -> dict[str, Any]:
        """A model as OpenAI's API describes it. Raises ApiError."""
        _, versions = self._found(asked, token)
        copies = [path for one in versions for path in self._state.archives.glob(f"{one.model}-{one.version}.*.mar")]
        created = max((int(path.stat().st_mtime) for path in copies), default=0)
        return {"id": asked, "object": "model", "created": created, "owned_by": "torchserve-dag"}

    def names(self, token: Token | None) -> list[str]:
        """The models that a token may call."""
        self._read()
        return sorted({one.model for one in self._served if may_call(token, one.model)})

    def _found(self, asked: str, token: Token | None) -> tuple[ModelName, list[ServedVersion]]:
        """A model, and those of its versions that may answer. Raises ApiError."""
        names = self.names(token)
        match = _ASKED.fullmatch(asked)
        found = ModelName(*match.groups()) if match else ModelName(asked)
        versions = [one for one in self._served if one.model == found.name and found.version in {None, one.version}]
        if not versions:
            hint = plain.did_you_mean(asked[:100], names) or "none is served"
            message = f'There is no language model "{asked[:100]}" here; {hint}'
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model")
        if token and not may_call(token, found.name):
            message = f"This token may call {', '.join(token.models)}, not {found.name}."
            raise ApiError(HTTPStatus.FORBIDDEN, message, param="model", code="model_not_allowed")
        return found, versions

    def _read(self) -> None:
        """Raises ApiError while nothing is served."""
        try:
            stamp = self._door.changed()
            if stamp != self._stamp:
                traffic = self._door.traffic()
                self._served = tuple(one for one in traffic.served if one.language)
                self.sees_clients_leave = traffic.sockets is not None
                self._stamp = stamp
        except (OSError, ServerError):
            message = "Nothing is served at the moment; try again."
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, headers=_AGAIN) from None


def may_call(token: Token | None, model: str) -> bool:
    return not (token and token.models) or model in token.models
