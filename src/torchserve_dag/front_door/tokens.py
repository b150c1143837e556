"""The front door's bearer tokens: signed JWTs with a name and an expiry. Revoked tokens are removed from the list."""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError

ISSUER = "torchserve-dag"
ALGORITHM = "HS256"
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

    @property
    def expired(self) -> bool:
        return self.expires <= time.time()


class TokenStore:
    """The signing key and the issued tokens of one project, in files that only the owner may read."""

    def __init__(self, folder: Path) -> None:
        self._key_file = folder / "token_key"
        self._file = folder / "tokens.json"

    def issued(self) -> list[Token]:
        """The tokens that are neither revoked nor expired. Raises ServerError."""
        try:
            data = json.loads(self._file.read_text("utf-8"))
            return [token for token in plain.build(list[Token], data) if not token.expired]
        except FileNotFoundError:
            return []
        except (ValueError, plain.WrongDataError) as error:
            raise ServerError(f"{self._file} cannot be read ({error}): delete it, and issue its tokens anew.") from None

    def issue(self, name: str, lives_s: float, requests_per_second: int | None = None) -> str:
        """Issue a token. Raises ServerError if the name is taken."""
        known = self.issued()
        if any(token.name == name for token in known):
            raise ServerError(f'There is a token "{name}" already: revoke it, or choose another name.')
        token = Token(name, secrets.token_hex(16), int(time.time() + lives_s), requests_per_second)
        self._save([*known, token])
        claims = {"iss": ISSUER, "sub": name, "jti": token.id, "exp": token.expires}
        return jwt.encode(claims, self._key(), ALGORITHM)

    def revoke(self, name: str) -> None:
        """Remove a token from the list of accepted ones. Raises ServerError if there is none of that name."""
        known = self.issued()
        left = [token for token in known if token.name != name]
        if len(left) == len(known):
            raise ServerError(f'There is no token "{name}"; {plain.did_you_mean(name, [t.name for t in known])}')
        self._save(left)

    def key_set(self) -> str:
        """The signing key as a JSON Web Key Set (RFC 7517)."""
        key = base64.urlsafe_b64encode(self._key()).rstrip(b"=").decode()
        fields: dict[str, Any] = {"kty": "oct", "alg": ALGORITHM, "k": key}
        return json.dumps({"keys": [fields]})

    def _key(self) -> bytes:
        try:
            return bytes.fromhex(self._key_file.read_text("utf-8"))
        except FileNotFoundError:
            key = secrets.token_bytes(32)
            atomic.write_private(self._key_file, key.hex())
            return key

    def _save(self, tokens: list[Token]) -> None:
        atomic.write_private(self._file, json.dumps(plain.flatten(tokens), indent=2))
