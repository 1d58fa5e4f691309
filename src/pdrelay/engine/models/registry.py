"""Architecture name to implementation, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch

from pdrelay.core.rank_config import AttentionName
from pdrelay.engine.attention.context import ForwardContext
from pdrelay.engine.backend import Backend
from pdrelay.engine.communicator import Communicator, SingleCommunicator
from pdrelay.engine.weights import open_weights
from pdrelay.model.config import ModelConfig, check_tp

_FAMILIES = {
    "llama": "pdrelay.engine.models.llama:LlamaForCausalLM",
    "qwen3": "pdrelay.engine.models.llama:LlamaForCausalLM",  # Llama with norms on q and k
}


class CausalLM(Protocol):
    backend: Backend

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """int64 [T] and [T] -> residual stream [T, hidden], before the final norm."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, hidden] of `forward` -> float32 [M, vocab]; final norm included."""

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype, rows maybe strided, valid until the next call."""


def build_model(
    model: str,
    config: ModelConfig,
    *,
    load_format: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    communicator: Communicator | None = None,
    use_kernels: bool = True,
    backend: Backend | None = None,
    attention: AttentionName = "auto",
) -> CausalLM:
    """This rank's part of a model, weights loaded. Raises ModelError.

    `use_kernels=False` keeps to torch operations where own kernels would run; `backend` replaces
    the choice altogether. `attention`: over pages, on CUDA. Raises LaunchError where it is not.
    """
    communicator = SingleCommunicator() if communicator is None else communicator
    check_tp(config, communicator.world_size)
    module, _, name = _FAMILIES[config.architecture].partition(":")
    family = getattr(import_module(module), name)
    device = torch.device("cpu") if device is None else device
    built: CausalLM = family(
        config,
        open_weights(model, load_format, seed, device),
        dtype=dtype,
        device=device,
        communicator=communicator,
        use_kernels=use_kernels,
        backend=backend,
        attention=attention,
    )
    return built
