"""A model that OpenVINO computes gives torch's answers; where it cannot, torch computes them."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchserve_dag.runtime.compute import Precision
from torchserve_dag.runtime.compute.cores import alone, set_alone
from torchserve_dag.runtime.compute.openvino import OpenVinoModel
from torchserve_dag.runtime.compute.placement import Placement


class Small(nn.Module):
    """A convolution and a head; `forward` is written as it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).relu().mean((2, 3)).reshape(x.shape[0], 8))  # type: ignore[no-any-return]


class BatchAsNumber(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).relu().mean((2, 3)).reshape(len(x), 8))  # type: ignore[no-any-return]


class Two(Small):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.convolution(x).amax((2, 3)), self.convolution(y).mean((2, 3))


class FirstOnly(nn.Module):
    """Each output depends on the whole batch: a converted one cannot be told from it at one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if len(x) == 1 else 3)


def put(module: nn.Module, precision: Precision = "float32") -> Any:
    return Placement(torch.device("cpu"), precision, runtime="openvino").put(module)


@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_its_answers_are_those_of_torch_for_every_batch(precision: Precision, near: float) -> None:
    placement = Placement(torch.device("cpu"), precision, runtime="openvino")
    module = Small().eval()
    model: Any = placement.put(module)
    for size in (1, 2, 7, 1):
        x = torch.rand(size, 3, 16, 16)
        with placement.inferring():  # bfloat16's autocast is not for a conversion
            found = model(x)
        assert torch.allclose(found, module(x), atol=near)
    assert not model.why_not


def test_several_inputs_and_outputs() -> None:
    model = put(Two())
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    found = model(x, y)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, model.module(x, y), strict=True))
    assert not model.why_not


@pytest.mark.parametrize("module", [BatchAsNumber(), FirstOnly()])
def test_a_size_that_was_traced_as_a_number_is_found_and_torch_computes(
    module: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    model = put(module)
    for size in (1, 3, 2):
        x = torch.rand(size, 3, 16, 16)
        assert torch.equal(model(x), module(x))
    assert model.why_not
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"torch computes {type(module).__name__}, not OpenVINO"
    ]


def test_inputs_of_another_form_are_computed_by_torch() -> None:
    model = put(Small())
    model(torch.rand(1, 3, 16, 16))
    other = torch.rand(2, 3, 20, 12)
    assert torch.allclose(model(other), model.module(other), atol=1e-4)
    assert torch.allclose(model(x=torch.ones(1, 3, 4, 4)), model.module(torch.ones(1, 3, 4, 4)))
    assert not model.why_not


def test_without_openvino_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = put(Small())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(x), model.module(x))
    assert "openvino" in model.why_not


def test_threads_convert_it_once_and_get_their_own_answers() -> None:
    model = OpenVinoModel(Small().eval(), "float32", 2, alone)
    start = threading.Barrier(4)

    def ask(i: int) -> bool:
        start.wait(10)
        set_alone(i % 2 == 0)
        x = torch.full((1, 3, 16, 16), float(i))
        return all(torch.allclose(model(x), model.module(x), atol=1e-3) for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(4)))
    assert not model.why_not


def test_whether_a_thread_is_alone_is_its_own() -> None:
    set_alone(True)
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(alone).result()
    assert alone()
    set_alone(False)
    assert not alone()
