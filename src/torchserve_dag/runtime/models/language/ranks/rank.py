"""The program of a rank: one of the processes that compute a model together. ranks.py starts it, and talks to it.

The engine's module loads the model (`load_rank`). Every rank gets every request, and takes part in its computation; the
first one, rank 0, writes the tokens.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import select
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.compat import link
from torchserve_dag.runtime.compat.child import end_with_worker

logger = logging.getLogger(__name__)

CANCEL = b"X"
"""To rank 0, beside the kinds of link.py: end the answer in progress."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank loads."""

    program: str
    """The engine's module, with its `load_rank`."""
    model: str
    """The model's folder."""
    rank: int
    ranks: int
    store: str
    """A file by which the ranks find each other."""
    device: str
    """`cpu`, or `cuda`: then each rank has the GPU of its own number."""
    dtype: str | None
    """The name of torch's type of the weights, or None: the one of the file."""
    threads: int
    prefill_tokens: int
    limit_s: float
    """How long one rank waits for another: longer than the worker waits for them, which knows better what failed."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.rank) if self.device == "cuda" else torch.device("cpu")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return getattr(torch, self.dtype) if self.dtype else None


@dataclass(frozen=True, slots=True)
class Job:
    """A request, as the ranks get it."""

    tokens: list[int]
    """The prompt."""
    most: int
    """The most tokens of the answer."""
    seed: int
    sampling: dict[str, Any] = field(default_factory=dict)
    """Arguments of transformers' `generate`."""


OnToken = Callable[[int], bool]
"""Takes the next token, and says whether the answer is to go on."""


class Rank(Protocol):
    """A rank's part of a loaded model."""

    def answer(self, job: Job, on_token: OnToken) -> str:
        """Take part in the computation of an answer, and return its finish reason. Rank 0 has to call `on_token`."""


def main() -> None:
    """Serve the worker's socket, whose descriptor is this program's argument, until the worker closes it."""
    end_with_worker()
    with socket.socket(fileno=int(sys.argv.pop())) as worker:
        message = link.receive(worker)
        if message is None:
            return
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars of progress in the log
        logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
        logging.getLogger().handlers[0].setFormatter(logs.Formatter())
        spec = json.loads(message[1])
        try:
            _serve(worker, RankSpec(**{name: spec[name] for name in RankSpec.__dataclass_fields__}))
        except Exception as error:
            logger.exception("A rank failed")
            link.send(worker, link.FAILED, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
            os._exit(1)  # not by the interpreter's end, which may wait for the other ranks


def _serve(worker: socket.socket, spec: RankSpec) -> None:
    torch.set_num_threads(spec.threads)
    rank = import_module(spec.program).load_rank(spec)
    link.send(worker, link.LOADED)
    while (message := link.receive(worker)) is not None:
        if message[0] == link.BATCH:  # a CANCEL that came too late is for an answer that has ended
            reason = rank.answer(Job(**json.loads(message[1])), lambda token: _sent(worker, token))
            link.send(worker, link.ANSWER, reason.encode())


def _sent(worker: socket.socket, token: int) -> bool:
    """Send a token; whether the worker has not cancelled the answer."""
    link.send(worker, link.CHUNK, str(token).encode())
    return not select.select([worker], [], [], 0)[0]  # during an answer nothing comes but CANCEL, or the worker's end


def join(spec: RankSpec) -> None:
    """Meet the other ranks."""
    cuda = spec.device == "cuda"
    if cuda:
        torch.cuda.set_device(spec.torch_device)
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on this machine; else the host's name must resolve
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=Path(spec.store).as_uri(),
        rank=spec.rank,
        world_size=spec.ranks,
        timeout=dt.timedelta(seconds=spec.limit_s),
    )


def generate(model: Any, job: Job, device: torch.device, on_token: OnToken) -> str:
    """Write an answer by transformers' `generate`, and return its finish reason."""
    torch.manual_seed(job.seed)
    prompt = torch.tensor([job.tokens], device=device)

    def goes_on(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:  # tokens: [1, prompt + answer]
        return torch.tensor([not on_token(int(tokens[0, -1]))], device=device)

    with torch.inference_mode():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.most,
            stopping_criteria=[goes_on],
            **job.sampling,
        )
    ends = model.generation_config.eos_token_id
    return "stop" if int(tokens[0, -1]) in (ends if isinstance(ends, list) else [ends]) else "length"


if __name__ == "__main__":
    main()
