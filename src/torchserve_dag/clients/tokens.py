"""TorchServe's tokens, from the `key_file.json` that it writes into its working directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tokens:
    """What each port wants to see. TorchServe lets a token lapse after 60 minutes, unless told otherwise."""

    inference: str = field(repr=False)
    management: str = field(repr=False)

    @classmethod
    def read(cls, path: Path | str) -> Tokens:
        """Raises OSError where there is no such file, ValueError where it holds no tokens (yet: a
        starting TorchServe makes the file empty, and then fills it).
        """
        try:
            keys = json.loads(Path(path).read_bytes())
            return cls(keys["inference"]["key"], keys["management"]["key"])
        except (ValueError, KeyError, TypeError):
            what = f"{path} holds no tokens; give the key_file.json of a running TorchServe"
            raise ValueError(what) from None


def bearer(token: str | None) -> dict[str, str]:
    """The header, or gRPC's metadata, that carries a token."""
    return {"authorization": f"Bearer {token}"} if token else {}
