"""Small random hub models, made on the spot, for the handlers that load any."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import (
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from torchserve_dag.runtime.project.weight_files import sha256

ROOT = Path(__file__).parents[1]
SPREAD = 0.3
"""Of the random weights; at the usual 0.02 every input gets much the same answer, and no test would bite."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "coffee", "was", "excellent", "cold", "and", "kind", "."]


def write_hub_project(root: Path) -> Path:
    """A project with the handlers of hub models as they are, each set to a small model of the kind it is for."""
    torch.manual_seed(0)
    models: dict[str, tuple[Callable[[Path], None], dict[str, object]]] = {
        "transformers_detector": (make_detector, {"threshold": 0.05}),
        "transformers_classifier": (make_photo_classifier, {"top": 2}),
        "text_classifier": (make_text_classifier, {"max_tokens": 16}),
        "text_moderation": (make_text_classifier, {"max_tokens": 8, "categories": {"rude": {"labels": ["NEGATIVE"]}}}),
    }
    (root / "handlers").mkdir(parents=True)
    for name, (make, settings) in models.items():
        make(root / "weights" / name)
        shutil.copy(ROOT / "handlers" / f"{name}.py", root / "handlers")
        file = yaml.safe_load((ROOT / "handlers" / f"{name}.yaml").read_text("utf-8"))
        file["settings"] = {"model": name} | settings
        digest = sha256(root / "weights" / name)
        file["card"]["weights"] = [{"file": name, "source": "made on the spot", "licence": "none", "sha256": digest}]
        (root / "handlers" / f"{name}.yaml").write_text(yaml.safe_dump(file), "utf-8")
    return root


def make_detector(folder: Path) -> None:
    """A YOLOS of two layers, with a size that depends on the photo's proportions."""
    labels = {0: "cup", 1: "cat"}
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 96],
        patch_size=16, num_detection_tokens=6, id2label=labels, label2id={v: k for k, v in labels.items()}, initializer_range=SPREAD,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)  # zeros would make every box the same
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)


def make_photo_classifier(folder: Path) -> None:
    """A ViT of two layers."""
    labels = {0: "espresso", 1: "tabby", 2: "moped"}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label=labels, label2id={v: k for k, v in labels.items()}, initializer_range=SPREAD,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def make_text_classifier(folder: Path) -> None:
    """A DistilBERT of two layers, with a vocabulary of a few words."""
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32,
        id2label=labels, label2id={v: k for k, v in labels.items()}, initializer_range=SPREAD,
    )  # fmt: skip
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS), "utf-8")
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
