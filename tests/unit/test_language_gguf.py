"""What a GGUF file says of its model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from torchserve_dag.runtime.models.language.llama_cpp.gguf import (
    cache_bytes,
    context_of,
    file_of,
    read_metadata,
    trained_context,
)
from torchserve_dag.runtime.models.language.settings import LanguageSettings

LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.block_count": 4,
    "llama.embedding_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(metadata: dict[str, Any]) -> bytes:
    """A file without weights, with texts, whole numbers, and lists of texts."""
    pairs = b""
    for key, value in metadata.items():
        if isinstance(value, list):
            pairs += text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(one) for one in value)
        else:
            pairs += text(key) + (
                struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
            )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + pairs


def test_the_metadata_is_read(tmp_path: Path) -> None:
    metadata = {**LLAMA, "tokenizer.ggml.tokens": ["a", "é", ""]}
    (tmp_path / "a.gguf").write_bytes(gguf(metadata) + b"weights")

    assert read_metadata(tmp_path / "a.gguf") == metadata
    assert trained_context(metadata) == 4096
    assert cache_bytes(metadata, 2) == 4 * 2 * (64 + 64) * 2


@pytest.mark.parametrize("length", [0, 3, 6, 20, 60])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf(LLAMA)[:length])

    with pytest.raises(ValueError, match=r"no GGUF file|is damaged"):
        read_metadata(tmp_path / "a.gguf")


def test_a_folder_has_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()

    assert file_of(tmp_path) == file_of(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    for wrong in (tmp_path, tmp_path / "c.gguf"):
        with pytest.raises(ValueError, match="exactly one"):
            file_of(wrong)


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({}, 4096),
        ({"context": 100}, 100),
        ({"cache_gb": 0.01, "room": 16}, int(0.01e9 / 2048 / 16)),
        ({"cache_gb": 0.01, "room": 4}, int(0.01e9 / 2048 / 4)),
    ],
)
def test_the_context_is_what_the_cache_holds(settings: dict[str, Any], context: int) -> None:
    """For each of `room` answers; 2,048 bytes for a token."""
    assert context_of(LanguageSettings("a", "llama.cpp", **settings), LLAMA, 2, 8192) == context


def test_a_context_that_the_cache_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16 answers of 4,000 tokens need cache_gb: 0.13; it is 0.1"):
        context_of(LanguageSettings("a", "llama.cpp", context=4000, cache_gb=0.1, room=16), LLAMA, 2, 8192)
    assert context_of(LanguageSettings("a", "llama.cpp"), {}, 2, 8192) == 8192
