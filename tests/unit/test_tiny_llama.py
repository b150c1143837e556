"""The small Llama that engines are compared by is the same every time, and every engine reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_llama import chat_prompt, greedy_text, greedy_tokens, make_draft, make_gguf, make_llama

QUESTION = "What is the capital of France?"


def test_the_model_is_the_same_every_time(tmp_path: Path) -> None:
    """So a test's texts may be compared across processes and machines."""
    first, second = make_llama(tmp_path / "first"), make_llama(tmp_path / "second")

    for file in ("model.safetensors", "tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_it_writes_varied_printable_text(tmp_path: Path) -> None:
    """A model that wrote one token over and over would let wrong positions and caches pass."""
    llama = make_llama(tmp_path / "llama")
    prompt = chat_prompt(llama, QUESTION)
    tokens = greedy_tokens(llama, prompt, 48)

    assert len(tokens) == 48
    assert len(set(tokens)) > 24
    assert greedy_text(llama, prompt, 48).isprintable()
    assert greedy_tokens(llama, "The quick", 48) != tokens


def test_its_draft_foresees_some_of_its_tokens(tmp_path: Path) -> None:
    llama = make_llama(tmp_path / "llama")
    draft = make_draft(tmp_path / "draft", llama)
    prompt = chat_prompt(llama, QUESTION)

    assert greedy_tokens(draft, prompt, 1) == greedy_tokens(llama, prompt, 1)
    assert greedy_tokens(draft, prompt, 48) != greedy_tokens(llama, prompt, 48)


def test_its_gguf_file_has_the_same_weights(tmp_path: Path) -> None:
    """Transformers reads it back, with a reader that is not this file's writer."""
    llama = make_llama(tmp_path / "llama")
    ids = AutoTokenizer.from_pretrained(llama)("The quick", return_tensors="pt", add_special_tokens=False)

    for half in (False, True):
        file = make_gguf(tmp_path / f"half {half}", llama, half=half)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        written = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]

        assert written.tolist() == greedy_tokens(llama, "The quick", 32)
