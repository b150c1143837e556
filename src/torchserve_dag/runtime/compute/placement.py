"""Where and how a model computes: device, precision, memory layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from torchserve_dag.runtime.compute import Precision, Runtime
from torchserve_dag.runtime.compute.cores import alone
from torchserve_dag.runtime.compute.openvino import OpenVinoModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Placement:
    """A handler's device, and how its model runs there."""

    device: torch.device
    precision: Precision = "float32"
    channels_last: bool = False
    runtime: Runtime = "torch"
    lanes: int = 1
    """How many threads compute on this machine's cores at the same time: see share_cores."""

    def put(self, module: M) -> M:
        """`module` ready to infer: on the device, without gradients, in this placement's layout and runtime."""
        module = module.eval().requires_grad_(requires_grad=False).to(self.device)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.runtime == "compiled":
            return torch.compile(module, dynamic=True)  # type: ignore[return-value]
        if self.runtime == "openvino" and self.device.type == "cpu":
            return OpenVinoModel(module, self.precision, self.lanes, alone)  # type: ignore[return-value]
        return module

    def tensor(self, batch: torch.Tensor) -> torch.Tensor:
        """`batch` on the device, in the layout that the model wants."""
        if self.channels_last and batch.dim() == 4:  # noqa: PLR2004 ([batch, channel, height, width])
            batch = batch.contiguous(memory_format=torch.channels_last)
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    @contextlib.contextmanager
    def inferring(self) -> Iterator[None]:
        """The context in which `infer` runs: no gradients, and bf16 where it is set."""
        with torch.inference_mode():
            if self.precision == "bfloat16":
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    yield
            else:
                yield


def find_device(name: str, gpu: int | None = None) -> torch.device:
    """`auto`, `cpu` or `cuda:N` as a device.

    `auto` is the GPU with the number `gpu`, without a number the first GPU, and on a machine without one the CPU.
    Raises ValueError where the named device does not exist.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", gpu or 0) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'"{name}" is not a device; write auto, cpu or cuda:N') from None
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{name} does not exist: this machine has {count} GPUs")
    if device.type not in {"cpu", "cuda"}:
        raise ValueError(f'"{name}" is not a device that is served; write auto, cpu or cuda:N')
    return device
