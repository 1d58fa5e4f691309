"""Model families and how to build one."""

from __future__ import annotations

from pdrelay.engine.models.registry import CausalLM, build_model

__all__ = ["CausalLM", "build_model"]
