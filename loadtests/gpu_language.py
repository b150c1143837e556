"""Language models on a GPU: the engines `vllm` and `transformers`, with the table of `language.py`.

    torchserve-dag add engine vllm
    python loadtests/gpu_language.py                          both engines, all modes: some twenty minutes
    python loadtests/gpu_language.py --engines vllm --model /models/Qwen3-8B --modes speed,pace

For `vllm` the bare loop is its own server, started with the same arguments, and asked over its own socket with the same
requests. It has not been run on a GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (this file may be run by its path)

from loadtests import language  # noqa: E402
from loadtests.language_arranged import show  # noqa: E402

ROOM, CLIENTS, PREFILL = 64, "1,4,16,32,64", 1024
"""A GPU's: more answers at a time, and more of a prompt in a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="vllm,transformers")
    parser.add_argument("--modes", default="speed,batching,prefix,pace")
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder of safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--clients", default=CLIENTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU: loadtests/language.py measures on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the server is stopped
    show(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    wrong = []
    for engine in options.engines.split(","):
        for mode in options.modes.split(","):
            words = [mode, "--engine", engine, "--model", options.model, "--clients", options.clients]
            words += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
            words += ["--room", str(ROOM), "--prefill-tokens", str(PREFILL)]
            wrong += [f"{engine}, {mode}: {line}" for line in language.measure(language.parser().parse_args(words))]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
