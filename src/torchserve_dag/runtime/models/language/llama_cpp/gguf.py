"""What a GGUF file says of its model, before it is loaded. The format is that of ggml, version 2 and 3."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from torchserve_dag.runtime.models.language.settings import LanguageSettings

MAGIC = b"GGUF"
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The format's codes of types, as `struct` has them."""
TEXT, LIST = 8, 9
VERSIONS = {2, 3}


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys and values before the weights. Raises ValueError if it is no GGUF file."""
    with path.open("rb") as file:
        try:
            if file.read(len(MAGIC)) != MAGIC or _number(file, "<I") not in VERSIONS:
                raise ValueError(f"{path} is no GGUF file of version 2 or 3")
            _number(file, "<Q")  # tensors
            return {_text(file).decode(): _value(file, _number(file, "<I")) for _ in range(_number(file, "<Q"))}
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: its metadata cannot be read") from error


def file_of(path: Path) -> Path:
    """The GGUF file at `path`, or the only one in that folder. Raises ValueError."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{path} is no GGUF file, and no folder with exactly one")
    return files[0]


def trained_context(metadata: dict[str, Any]) -> int | None:
    """The tokens of context that the model was trained with."""
    found = _of_model(metadata, "context_length")
    return int(found) if found else None


def cache_bytes(metadata: dict[str, Any], bytes_per_value: int) -> int:
    """Bytes of keys and values for one token in all layers; 0 for a model that has none."""
    layers, heads = _of_model(metadata, "block_count") or 0, _of_model(metadata, "attention.head_count") or 0
    shared = _of_model(metadata, "attention.head_count_kv") or heads
    head = (_of_model(metadata, "embedding_length") or 0) // (heads if isinstance(heads, int) and heads else 1)
    width = sum(_of_model(metadata, f"attention.{name}_length") or head for name in ("key", "value"))
    return (sum(shared) if isinstance(shared, list) else layers * shared) * width * bytes_per_value


def context_of(settings: LanguageSettings, metadata: dict[str, Any], bytes_per_value: int, most: int) -> int:
    """The tokens of context for each of `room` answers, in a cache of `cache_gb`: what the settings say, or else what
    the model was trained with, at most `most`, and what fits. Raises ValueError if what they say does not fit.
    """
    wanted = settings.context or min(trained_context(metadata) or most, most)
    for_all = wanted * settings.room * cache_bytes(metadata, bytes_per_value)
    fits = int(wanted * min(settings.cache_gb * 1e9 / for_all, 1)) if for_all else wanted
    if settings.context and fits < settings.context:
        what = f"{settings.room} answers of {settings.context:,} tokens need cache_gb: {for_all / 1e9:.2g}"
        raise ValueError(f"{what}; it is {settings.cache_gb:g}: raise it, or lower room or context")
    if fits < 1:
        raise ValueError("cache_gb has no room for a token: raise it")
    return fits


def _of_model(metadata: dict[str, Any], name: str) -> Any:
    return metadata.get(f"{metadata.get('general.architecture')}.{name}")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == TEXT:
        return _text(file).decode(errors="replace")
    if kind == LIST:
        inner, length = _number(file, "<I"), _number(file, "<Q")
        return [_value(file, inner) for _ in range(length)]
    return _number(file, NUMBERS[kind])


def _text(file: BinaryIO) -> bytes:
    return file.read(_number(file, "<Q"))


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
