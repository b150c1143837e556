"""The engine `deepspeed`: `deepspeed.init_inference`, and its AutoTP, which cuts a model's matrices over several ranks.

DeepSpeed's own kernels are not used: none is for CPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from torchserve_dag.runtime.models.language.hub_folder import hub_config
from torchserve_dag.runtime.models.language.ranks import rank as ranks_program
from torchserve_dag.runtime.models.language.ranks.rank import Job, OnToken, RankSpec

if TYPE_CHECKING:
    from torchserve_dag.runtime.compute.placement import Placement
    from torchserve_dag.runtime.models.language.engine import LanguageEngine
    from torchserve_dag.runtime.models.language.settings import LanguageSettings


def load(folder: Path, settings: LanguageSettings, placement: Placement) -> LanguageEngine:
    """The model below `folder`, in `options: {ranks: N}` processes; 1 is enough. Raises ValueError."""
    from torchserve_dag.runtime.models.language.ranks.engine import load_ranks  # noqa: PLC0415 (no rank needs it)

    return load_ranks(__name__, folder, settings, placement, check)


def check(model: Path, ranks: int) -> None:
    """Raises ValueError for a model with fewer heads than ranks; an uneven number of them can be shared."""
    config = hub_config(model)
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads", ranks)
    if heads < ranks:
        raise ValueError(f"{model.name} has {heads} heads of keys and values: they cannot be shared by {ranks} ranks")


def load_rank(spec: RankSpec) -> Shard:
    """This rank's part of every matrix."""
    import deepspeed  # noqa: PLC0415 (only this engine needs it)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    ranks_program.join(spec)
    # It would compile a C++ extension for shared memory, without which it uses torch.distributed.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), auto_mpi_discovery=False)
    model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.torch_dtype or "auto")
    engine = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": spec.ranks}, dtype=model.dtype, replace_with_kernel_inject=False
    )
    return Shard(spec, engine.module)


class Shard:
    """A rank's part of the model. Every rank writes the whole answer, and computes its part of each token."""

    def __init__(self, spec: RankSpec, model: Any) -> None:
        self._first, self._device, self._model = spec.rank == 0, spec.torch_device, model

    def answer(self, job: Job, on_token: OnToken) -> str:
        def all_go_on(token: int) -> bool:
            goes_on = on_token(token) if self._first else True
            told = torch.tensor([token, goes_on], device=self._device)
            distributed.broadcast(told, 0)
            if int(told[0]) != token:
                raise RuntimeError("the ranks have written different tokens")
            return bool(told[1])

        return ranks_program.generate(self._model, job, self._device, all_go_on)
