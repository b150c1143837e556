"""The handler `text_embedding`: the mean of a model's states, the same in every batch, with torch and with OpenVINO."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from tests.tiny_models import ROOT, SPREAD, WORDS
from torchserve_dag import Embedding, InputError, Placement, Text

spec = importlib.util.spec_from_file_location("text_embedding", ROOT / "handlers" / "text_embedding.py")
assert spec is not None
assert spec.loader is not None
module = sys.modules["text_embedding"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

TEXTS = ["the coffee was excellent", "cold", "the coffee was cold and the coffee was kind . " * 3]
SMALL = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64, "initializer_range": SPREAD, "pad_token_id": 0}  # fmt: skip


def make(folder: Path, kind: str = "bert") -> Path:
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertModel(BertConfig(**SMALL)),
        "roberta": lambda: RobertaModel(RobertaConfig(**SMALL)),
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(
                vocab_size=len(WORDS), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64
            )
        ),
        "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    }[kind]()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def handler(folder: Path, runtime: str = "torch", **settings):
    made = module.TextEmbedding()
    made.load(
        folder.parent,
        module.EmbeddingSettings(model=folder.name, max_tokens=48, **settings),
        Placement(torch.device("cpu"), runtime=runtime),
    )
    return made


def embed(made, texts: list[str]) -> list[Embedding]:
    with made.placement.inferring():
        outputs = made.infer([made.preprocess(Text(text)) for text in texts])
    return [made.postprocess(output, Text(text)) for output, text in zip(outputs, texts, strict=True)]


def reference(folder: Path, text: str) -> list[float]:
    """One text alone, by transformers itself."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder, dtype=torch.float32)(**tokens).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=0).tolist()


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_vector_is_the_mean_of_the_models_states_whatever_is_beside(tmp_path: Path, kind: str, runtime: str) -> None:
    folder = make(tmp_path / kind, kind)
    made = handler(folder, runtime)
    embed(made, TEXTS[:1])  # as the warm-up: OpenVINO converts it

    assert getattr(made.model, "why_not", "") == ""
    for texts in (TEXTS, TEXTS[1:2], TEXTS[::-1]):
        for text, answer in zip(texts, embed(made, texts), strict=True):
            assert answer.embedding == pytest.approx(reference(folder, text), abs=1e-4)


def test_the_tokens_are_counted(tmp_path: Path) -> None:
    usages = [answer.usage for answer in embed(handler(make(tmp_path / "bert")), TEXTS[:2])]

    assert [usage and usage.prompt_tokens for usage in usages] == [6, 3]  # with [CLS] and [SEP]


def test_a_vector_has_the_length_1_unless_it_is_not_wanted(tmp_path: Path) -> None:
    folder = make(tmp_path / "bert")
    lengths = [
        torch.tensor(embed(handler(folder, normalize=wanted), TEXTS[:1])[0].embedding).norm()
        for wanted in (True, False)
    ]

    assert lengths[0] == pytest.approx(1)
    assert lengths[1] != pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(" \n", "blank"), ("coffee " * 60, "62 tokens; the limit is 48"), ("x" * 5000, "5,000 characters")],
)
def test_a_text_that_has_no_vector_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    made = handler(make(tmp_path / "bert"))

    with pytest.raises(InputError, match=sentence) as refused:
        made.preprocess(Text(text))
    assert refused.value.status == 422


def test_a_model_that_cannot_keep_texts_apart_is_not_loaded(tmp_path: Path) -> None:
    """A token of GPT-2's sees those before it only, which the mask that keeps texts apart would change."""
    folder = make(tmp_path / "gpt2", "gpt2")

    with pytest.raises(ValueError, match="gpt2 cannot be packed: beside another text"):
        handler(folder)


def test_a_limit_beyond_the_models_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "bert")

    with pytest.raises(ValueError, match="takes 64 at most"):
        module.TextEmbedding().load(tmp_path, module.EmbeddingSettings(folder.name), Placement(torch.device("cpu")))
