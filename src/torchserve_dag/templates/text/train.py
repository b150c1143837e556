"""Train the network of language_model.py on sentences.tsv, and write it into weights/language/.

python train.py && torchserve-dag build --update-cards
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from language_model import LanguageModel, trigrams

ROOT = Path(__file__).parent
WEIGHTS = ROOT / "weights" / "language"
STEPS = 150


def main() -> None:
    lines = (ROOT / "sentences.tsv").read_text("utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    languages = sorted({language for language, _ in pairs})
    wanted = torch.tensor([languages.index(language) for language, _ in pairs])
    texts = [trigrams(text) for _, text in pairs]
    starts = torch.tensor([0, *(len(text) for text in texts[:-1])]).cumsum(0)

    torch.manual_seed(0)
    model = LanguageModel(len(languages))
    torch.nn.init.zeros_(model.rows.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(torch.cat(texts), starts), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    WEIGHTS.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), WEIGHTS / "model.safetensors")
    (WEIGHTS / "languages.json").write_text(json.dumps(languages), "utf-8")
    print(f"weights/language: {len(languages)} languages, {len(pairs)} sentences, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
