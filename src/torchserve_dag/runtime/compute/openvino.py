"""A torch module that OpenVINO computes on the CPU, if its answers prove equal to torch's."""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

BATCHES = (1, 3)
"""The batch sizes at which a converted module is compared with its original: a size that tracing turned into a
constant (`len(x)` instead of `x.shape[0]`) gives wrong answers for other sizes, without an error."""

MOST_COPIES = 4
"""Compiled copies for concurrent requests, each with its own packed weights. The streams of one copy wait for each
other: with a copy for each of two cores, the demo's two models, taking turns, had 11 % more throughput."""

TOLERANCE = 1e-3
"""The tolerated difference from torch in float32, relative to the output's largest value."""


class OpenVinoModel(nn.Module):
    """Takes the place of `module`. It is converted at its first inputs, while the handler warms up.

    If the conversion fails, and for inputs that differ from the first in more than the batch dimension, torch
    computes.
    """

    def __init__(self, module: nn.Module, precision: str, lanes: int, alone: Callable[[], bool]) -> None:
        """`lanes`: the threads that call it; `alone`: whether the calling thread may use the cores of all of them."""
        super().__init__()
        self.module = module
        self.precision = precision
        self.why_not = ""
        """Why torch computes the module instead."""
        self._lanes = lanes
        self._alone = alone
        self._converting = threading.Lock()
        self._forms: _Forms | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's output: a tensor, or a tuple of tensors."""
        if named or not all(isinstance(value, torch.Tensor) and value.dim() for value in inputs):
            if self._forms is None:
                self.why_not = self.why_not or "its inputs are passed by name, or are not tensors"
            return self.module(*inputs, **named)
        if self._forms is None and not self.why_not:
            with self._converting:
                if self._forms is None and not self.why_not:
                    self._convert(inputs)
        if self._forms is None or self._forms.takes != _kinds(inputs):
            return self.module(*inputs)
        return self._forms(inputs, alone=self._alone())

    def _convert(self, inputs: Sequence[torch.Tensor]) -> None:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                model = _converted(self.module, inputs)
                forms = _Forms(model, inputs, "float32", self._lanes)
                forms.compare(self.module, inputs)
            if self.precision != "float32":  # its accuracy is for the author of the card to judge
                forms = _Forms(model, inputs, self.precision, self._lanes)
        except Exception as error:  # noqa: BLE001 (after any failure torch computes the module)
            self.why_not = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            logger.warning("torch computes %s, not OpenVINO: %s", type(self.module).__name__, self.why_not)
        else:
            self._forms = forms


class _Forms:
    """The converted module, compiled twice: for concurrent requests, and for a single request that may use every core.

    Each concurrent request has as many threads as torch is set to.
    """

    def __init__(self, model: Any, inputs: Sequence[torch.Tensor], precision: str, lanes: int) -> None:
        import openvino  # noqa: PLC0415 (an archive is served where it is not installed, too)

        self.takes = _kinds(inputs)
        core = openvino.Core()
        threads = torch.get_num_threads()
        hint = {"float32": "f32", "bfloat16": "bf16"}[precision]

        def compiled(streams: int, threads: int) -> Any:
            # Not pinned: threads of several workers would be pinned to the same cores.
            options = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
            return core.compile_model(model, "CPU", options | {"INFERENCE_PRECISION_HINT": hint})

        copies = min(lanes, MOST_COPIES)
        streams = -(-lanes // copies)
        self._shared = _Requests([compiled(streams, streams * threads) for _ in range(copies)])
        self._alone = _Requests([compiled(1, lanes * threads)]) if lanes > 1 else self._shared

    def __call__(self, inputs: Sequence[torch.Tensor], *, alone: bool) -> Any:
        request = (self._alone if alone else self._shared).of_this_thread()
        result = request.infer([value.detach().contiguous().numpy() for value in inputs], share_inputs=True)
        outputs = tuple(torch.from_numpy(result[i]) for i in range(len(result)))
        return outputs if len(outputs) > 1 else outputs[0]

    def compare(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        """Raises ValueError if its answers differ from the module's."""
        for size in BATCHES:
            batch = [torch.cat([value[:1]] * size) for value in inputs]
            original = module(*batch)
            wanted = original if isinstance(original, tuple) else (original,)
            for alone in (False, True):
                output = self(batch, alone=alone)
                outputs = output if isinstance(output, tuple) else (output,)
                for got, want in zip(outputs, wanted, strict=True):
                    off = (got - want).abs().max() if got.shape == want.shape else torch.tensor(torch.inf)
                    if not off <= TOLERANCE * want.abs().max():  # also if it is NaN
                        raise ValueError(f"for a batch of {size} its answers differ from torch's by {off:.2g}")


class _Requests:
    """OpenVINO's inference requests, which hold buffers: one for each thread, from the copies in turn."""

    def __init__(self, copies: Sequence[Any]) -> None:
        self._next = itertools.cycle(copies)
        self._here = threading.local()

    def of_this_thread(self) -> Any:
        request = getattr(self._here, "request", None)
        if request is None:
            request = self._here.request = next(self._next).create_infer_request()
        return request


def _converted(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """An OpenVINO model whose inputs have any size in their first dimension.

    `openvino.convert_model` does the same, but reports its use to the vendor.
    """
    from openvino import PartialShape  # noqa: PLC0415 (as above)
    from openvino.frontend import FrontEndManager  # noqa: PLC0415
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of mistakes that `compare` finds, and of its own deprecation
        traced = torch.jit.trace(module, tuple(inputs), check_trace=False)  # type: ignore[no-untyped-call]
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(
        traced, example_input=tuple(inputs)
    )  # kept until `convert`, because OpenVINO holds no reference
    model = frontend.convert(frontend.load(decoder))
    for i, value in enumerate(inputs):
        node = model.input(i).get_node()
        node.set_element_type(_element_type(value))
        node.set_partial_shape(PartialShape([-1, *value.shape[1:]]))
    model.validate_nodes_and_infer_types()
    return model


def _element_type(value: torch.Tensor) -> Any:
    from openvino import Type  # noqa: PLC0415 (as above)

    return Type(value.numpy().dtype)


def _kinds(inputs: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(value.dtype, value.shape[1:]) for value in inputs]
