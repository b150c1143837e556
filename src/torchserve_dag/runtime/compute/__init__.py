"""Where and how a model computes. `placement` and `openvino`, which only handlers need, import torch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16"]
Runtime = Literal["torch", "compiled", "openvino"]
"""What computes a model: torch eagerly, `torch.compile`, or, on a CPU, OpenVINO."""
