"""KV hand-over between two vLLM instances of one host, as an out-of-tree KV connector.

    --kv-transfer-config '{"kv_connector": "PdrelayConnector",
        "kv_connector_module_path": "pdrelay.integrations.vllm", "kv_role": "kv_producer",
        "kv_connector_extra_config": {"address": "/run/me/prefill.sock"}}'

Only `PdrelayConnector` needs vLLM, only it and the modules that touch tensors need torch; they load
when it is first asked for. docs/vllm.md says how to use it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PdrelayConnector"]


def __getattr__(name: str) -> Any:
    if name == "PdrelayConnector":
        from pdrelay.integrations.vllm.connector import PdrelayConnector

        _register()
        return PdrelayConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    """By name, too: MultiConnector looks up so whose statistics it has."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector("PdrelayConnector", __name__, "PdrelayConnector")
    except ValueError:  # it was asked for before
        return
