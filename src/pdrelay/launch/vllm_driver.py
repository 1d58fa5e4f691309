"""vLLM as a driver: `python -m vllm.entrypoints.openai.api_server`, one an instance."""

from __future__ import annotations

import json
import os
from typing import Any

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import Ready, Role
from pdrelay.doctor.version import Version, in_range, parse_version
from pdrelay.integrations import bearer
from pdrelay.integrations.bearer import KEY_VARIABLE
from pdrelay.launch.external_driver import ExternalDriver, flag_of, import_path
from pdrelay.launch.topology import InstanceSpec

MODULE = "vllm.entrypoints.openai.api_server"
_CLI = ("vllm.entrypoints.cli.main", "serve")  # `vllm serve`
_API_SERVERS = ("--api-server-count", "-asc")  # which MODULE takes and ignores
OWNED = (  # chosen here: not to be given in --engine-args
    "--host",
    "--port",
    "--uds",
    "--model",
    "--served-model-name",
    "--tensor-parallel-size",
    "-tp",
    "--kv-transfer-config",
    "--api-key",
)
_KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}
_LEASE_S = 30
_GENERATE_IS_OPTIONAL: Version = (0, 30, 0)  # before, /inference/v1/generate is always there
_KEEP_ALIVE_S = "75"  # idle connections of the front door are not to be cut under it
_CPU_KV_GIB = "1"
_FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def sampler_environment(has_flashinfer: bool) -> dict[str, str]:
    """On GPUs vLLM imports FlashInfer unless told not to: without it, what says so, where the user
    has not chosen."""
    if has_flashinfer or _FLASHINFER_SAMPLER in os.environ:
        return {}
    return {_FLASHINFER_SAMPLER: "0"}


def generate_arguments(version: str) -> list[str]:
    """What makes a release serve /inference/v1/generate."""
    optional = in_range(parse_version(version), _GENERATE_IS_OPTIONAL, None)
    return ["--enable-scale-out"] if optional else []


class VllmDriver(ExternalDriver):
    """Versions 0.23 to 0.33."""

    def arguments(self, spec: InstanceSpec, incarnation: int, port: int) -> list[str]:
        plan = self.plan
        engine, resolved = plan.config.engine, plan.resolved
        asked = {flag_of(argument) for argument in plan.config.external.engine_args}
        args = ["-m", *(_CLI if asked.intersection(_API_SERVERS) else (MODULE,))]
        args += ["--model", plan.model_dir]
        args += ["--served-model-name", resolved.served_model_name]
        args += ["--host", "127.0.0.1", "--port", str(port)]
        args += ["--max-model-len", str(resolved.max_model_len), "--seed", str(engine.seed)]
        # The front door sends every sampling parameter: no defaults of the directory's.
        args += ["--generation-config", "vllm", "--enable-prompt-tokens-details"]
        args += ["--disable-uvicorn-access-log", "--dtype", resolved.dtype]
        args += generate_arguments(plan.version)
        if plan.api_key:
            args += ["--middleware", f"{bearer.__name__}.{bearer.RequireKey.__name__}"]
        if resolved.load_format == "dummy":
            args += ["--load-format", "dummy"]
        if spec.world_size > 1:
            args += ["--tensor-parallel-size", str(spec.world_size)]
        if not engine.enable_prefix_caching:
            args += ["--no-enable-prefix-caching"]
        if resolved.device == "cuda":
            share = resolved.gpu_memory_utilization / plan.sharers(spec)
            args += ["--gpu-memory-utilization", f"{share:g}"]
        if engine.kv_cache_memory is not None and resolved.device == "cuda":
            args += ["--kv-cache-memory-bytes", str(engine.kv_cache_memory)]
        if spec.role is not Role.BOTH:
            args += ["--kv-transfer-config", json.dumps(self._kv_transfer(spec, incarnation))]
        return args

    def _kv_transfer(self, spec: InstanceSpec, incarnation: int) -> dict[str, Any]:
        role = _KV_ROLES[spec.role]
        if self.plan.resolved.transport == "nixl":
            return {"kv_connector": "NixlConnector", "kv_role": role}
        extra = {"address": self._address(spec, incarnation), "lease_s": _LEASE_S}
        if self.plan.resolved.transport == "pdrelay-nccl":
            extra["transport"] = "nccl"
        return {
            "kv_connector": "PdrelayConnector",
            "kv_connector_module_path": "pdrelay.integrations.vllm",
            "kv_role": role,
            "kv_connector_extra_config": extra,
        }

    def _address(self, spec: InstanceSpec, incarnation: int) -> str:
        return self.plan.run_dir.peer_address(spec, incarnation)

    def environment(self, spec: InstanceSpec) -> dict[str, str]:
        plan = self.plan
        # Sockets in the private directory: none is left behind, whatever kills the server.
        env = {
            "VLLM_RPC_BASE_PATH": str(plan.run_dir.path),
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": _KEEP_ALIVE_S,
        }
        if plan.api_key:
            env[KEY_VARIABLE] = plan.api_key
            if "VLLM_API_KEY" in os.environ:  # the user's, which the front door does not send
                env["VLLM_API_KEY"] = ""
        if plan.resolved.device == "cpu":
            env |= self._cpu_environment()
        else:
            env["VLLM_ALLREDUCE_USE_SYMM_MEM"] = os.environ.get("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
            env |= sampler_environment(plan.has_flashinfer)
        if spec.role is not Role.BOTH and plan.resolved.transport == "nixl":
            env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(plan.ports.port(f"{spec.instance}.nixl"))
            env["UCX_TLS"] = os.environ.get("UCX_TLS", "all")
        inherited = os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = ":".join(filter(None, [import_path(plan.run_dir), inherited]))
        return env

    def notes(self) -> list[str]:
        on_gpu = self.plan.resolved.device == "cuda"
        if not (on_gpu and sampler_environment(self.plan.has_flashinfer)):
            return []
        return [
            f"this environment has no flashinfer: {_FLASHINFER_SAMPLER}=0, vLLM samples with "
            "kernels of its own"
        ]

    def _cpu_environment(self) -> dict[str, str]:
        defaults = {
            "OMP_NUM_THREADS": str(self.plan.resolved.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": _CPU_KV_GIB,
        }
        return {key: os.environ.get(key, value) for key, value in defaults.items()}

    def endpoint(
        self, spec: InstanceSpec, incarnation: int, ready: Ready, url: str
    ) -> HttpEndpoint:
        own = self.plan.resolved.transport in ("pdrelay", "pdrelay-nccl")
        produces = own and spec.role is Role.PREFILL
        return HttpEndpoint(
            engine="vllm",
            url=url,
            ready=ready,
            api_key=self.plan.api_key,
            producer_address=self._address(spec, incarnation) if produces else "",
        )
