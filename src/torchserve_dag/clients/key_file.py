"""The `key_file.json` that TorchServe writes into its working directory: a token for each of its ports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class KeyFile:
    """TorchServe's own tokens. They expire after 60 minutes, unless its `token_expiration_min` says otherwise."""

    inference: str = field(repr=False)
    management: str = field(repr=False)

    @classmethod
    def read(cls, path: Path | str) -> KeyFile:
        """Raises OSError if there is no such file, ValueError if it holds no tokens (or none yet: a starting
        TorchServe creates the file empty, and then fills it).
        """
        try:
            keys = json.loads(Path(path).read_bytes())
            return cls(keys["inference"]["key"], keys["management"]["key"])
        except (ValueError, KeyError, TypeError):
            what = f"{path} holds no tokens; give the key_file.json of a running TorchServe"
            raise ValueError(what) from None
