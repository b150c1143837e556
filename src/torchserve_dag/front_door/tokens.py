"""The front door's bearer tokens: signed JWTs with a name and an expiry. Revoked tokens are removed from the list."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError

ISSUER = "torchserve-dag"
ALGORITHM = "HS256"
NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
"""A token's name, which is also the name of its record's file, and is logged with every request."""
ONLY_V1 = "only_v1"
"""The claim that says whether a token calls models at `/v1` only."""
OWN = "command-line"
"""The name of the token that this project's commands use."""


@dataclass(frozen=True, slots=True)
class Token:
    """The record of an issued token; the token itself is not stored."""

    name: str
    id: str
    expires: int
    """In seconds since 1970."""
    requests_per_second: int | None = None
    tokens_per_minute: int | None = None
    """How many tokens of language models it may use in a minute."""
    models: tuple[str, ...] = ()
    """The language models that it may call, by name; empty for all."""

    @property
    def only_v1(self) -> bool:
        """Whether it calls models at `/v1` only, where its limits are known."""
        return bool(self.tokens_per_minute or self.models)

    @property
    def expired(self) -> bool:
        return self.expires <= time.time()


class TokenStore:
    """The signing key and the issued tokens of one project, in files that only the owner may read.

    Each token's record is a file of its own. So a revocation is the deletion of a file: it waits for no lock, needs no
    space on the disk, and reads no other file.
    """

    def __init__(self, folder: Path) -> None:
        self._key_file = folder / "token_key"
        self._folder = folder / "tokens"

    def issued(self) -> list[Token]:
        """The tokens that are neither revoked nor expired. A record that cannot be read is no token."""
        found = (_read(path) for path in sorted(self._folder.glob("*.json")))
        return [token for token in found if token and not token.expired]

    def find(self, name: str) -> Token | None:
        """The token of a name, unless it was revoked or has expired."""
        token = _read(self._folder / f"{name}.json") if NAME.fullmatch(name) else None
        return token if token and not token.expired else None

    def issue(
        self,
        name: str,
        lives_s: float,
        requests_per_second: int | None = None,
        tokens_per_minute: int | None = None,
        models: Collection[str] = (),
    ) -> str:
        """Issue a token. Raises ServerError if the name is taken."""
        path, key = self._record(name), self._key()
        expires = int(time.time() + lives_s)
        token = Token(
            name, secrets.token_hex(16), expires, requests_per_second, tokens_per_minute, tuple(sorted(models))
        )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic.part_of(path) as part:
            part.touch(mode=0o600)
            part.write_text(json.dumps(plain.flatten(token)), "utf-8")
            try:
                os.link(part, path)
            except FileExistsError:
                before = _read(path)
                if before and not before.expired:
                    taken = f'There is a token "{name}" already: revoke it, or choose another name.'
                    raise ServerError(taken) from None
                part.replace(path)
        claims = {"iss": ISSUER, "sub": name, "jti": token.id, "exp": token.expires, ONLY_V1: token.only_v1}
        return jwt.encode(claims, key, ALGORITHM)

    def revoke(self, name: str) -> None:
        """Delete a token's record, for good when this returns. Raises ServerError if there is none of that name."""
        try:
            self._record(name).unlink()
        except FileNotFoundError:
            known = [token.name for token in self.issued()]
            raise ServerError(f'There is no token "{name}"; {plain.did_you_mean(name, known)}') from None
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # after a power failure, the token must not be there again
        finally:
            os.close(folder)

    def key_set(self) -> str:
        """The signing key as a JSON Web Key Set (RFC 7517)."""
        key = base64.urlsafe_b64encode(self._key()).rstrip(b"=").decode()
        fields: dict[str, Any] = {"kty": "oct", "alg": ALGORITHM, "k": key}
        return json.dumps({"keys": [fields]})

    def _record(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ServerError(f'"{name}" is no name of a token: up to 64 letters, digits, and . _ @ -')
        return self._folder / f"{name}.json"

    def _key(self) -> bytes:
        try:
            return bytes.fromhex(self._key_file.read_text("utf-8"))
        except FileNotFoundError:
            self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic.part_of(self._key_file) as part:
                part.touch(mode=0o600)
                part.write_text(secrets.token_hex(32), "utf-8")
                with suppress(FileExistsError):  # of two commands that make the first key, one does
                    os.link(part, self._key_file)
            return self._key()


def _read(path: Path) -> Token | None:
    try:
        return plain.build(Token, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, plain.WrongDataError):
        return None
