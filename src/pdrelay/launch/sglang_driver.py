"""SGLang as a driver: `python -m sglang.launch_server`, one an instance."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.messages import Ready, Role
from pdrelay.doctor.version import Version, in_range, parse_version, show_version
from pdrelay.launch.external_driver import ExternalDriver, flag_of
from pdrelay.launch.topology import InstanceSpec

MODULE = "sglang.launch_server"
OWNED = (  # chosen here: not to be given in --engine-args
    "--host",
    "--port",
    "--model-path",
    "--model",
    "--served-model-name",
    "--tensor-parallel-size",
    "--tp-size",
    "--tp",
    "--disaggregation-mode",
    "--disaggregation-transfer-backend",
    "--disaggregation-bootstrap-port",
    "--api-key",
)
_MODES = {Role.PREFILL: "prefill", Role.DECODE: "decode"}
_HOST = "127.0.0.1"
_CONFIG_SINCE: Version = (0, 5, 3)  # --config
# Its users' own: a second --config is refused, and several tokenizer workers take no key.
_WITHOUT_KEY = ("--config", "--tokenizer-worker-num")


class SglangDriver(ExternalDriver):
    """Versions from 0.5, whose /generate tells token ids."""

    def arguments(self, spec: InstanceSpec, incarnation: int, port: int) -> list[str]:
        plan = self.plan
        engine, resolved = plan.config.engine, plan.resolved
        args = ["-m", MODULE, "--model-path", plan.model_dir]
        args += ["--served-model-name", resolved.served_model_name]
        args += ["--host", _HOST, "--port", str(port)]
        args += ["--context-length", str(resolved.max_model_len), "--random-seed", str(engine.seed)]
        args += ["--dtype", resolved.dtype, *plan.engine_flags, "--log-level-http", "warning"]
        if self._has_key:
            args += ["--config", str(self._key_file)]
        if resolved.device == "cpu":
            args += ["--device", "cpu"]
        if resolved.load_format == "dummy":
            args += ["--load-format", "dummy"]
        if spec.world_size > 1:
            args += ["--tp", str(spec.world_size)]
        if not engine.enable_prefix_caching:
            args += ["--disable-radix-cache"]
        if spec.role is not Role.BOTH:
            args += ["--disaggregation-mode", _MODES[spec.role]]
            args += ["--disaggregation-transfer-backend", resolved.transport]
        if spec.role is Role.PREFILL:
            bootstrap_port = self._bootstrap_port(spec, incarnation)
            args += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
        return args

    @cached_property
    def _has_key(self) -> bool:
        given = set(map(flag_of, self.plan.config.external.engine_args))
        known = in_range(parse_version(self.plan.version), _CONFIG_SINCE, None)
        return known and given.isdisjoint(_WITHOUT_KEY)

    @cached_property
    def _key_file(self) -> Path:
        """On the command line every user of the host could read the key. Written once: instances
        read it while others are launched."""
        path = self.plan.run_dir.path / "sglang.yaml"
        content = json.dumps({"api-key": self.plan.api_key})
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(content)
        return path

    def notes(self) -> list[str]:
        if self._has_key:
            return []
        return [
            "anybody on this host can ask SGLang's instances directly: a key for them needs SGLang "
            f"{show_version(_CONFIG_SINCE)} and --engine-args without {' and '.join(_WITHOUT_KEY)}"
        ]

    def _bootstrap_port(self, spec: InstanceSpec, incarnation: int) -> int:
        """Another for each incarnation: consumers remember by it where a producer's ranks listen,
        and wait for a restarted one at its dead predecessor's ports."""
        return self.plan.ports.port(f"{spec.instance}.{incarnation}.bootstrap")

    def environment(self, spec: InstanceSpec) -> dict[str, str]:
        env = {}
        if spec.role is not Role.BOTH and not {"SGLANG_HOST_IP", "HOST_IP"} & os.environ.keys():
            env["SGLANG_HOST_IP"] = _HOST  # else the two sides' ranks listen on the network's
        if self.plan.resolved.device == "cpu":
            env["SGLANG_USE_CPU_ENGINE"] = "1"  # `--device cpu` alone leaves a GPU's kernels
            threads = str(self.plan.resolved.num_threads)
            env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
        return env

    def endpoint(
        self, spec: InstanceSpec, incarnation: int, ready: Ready, url: str
    ) -> HttpEndpoint:
        produces = spec.role is Role.PREFILL
        return HttpEndpoint(
            engine="sglang",
            url=url,
            ready=ready,
            api_key=self.plan.api_key if self._has_key else "",
            bootstrap_host=_HOST if produces else "",
            bootstrap_port=self._bootstrap_port(spec, incarnation) if produces else 0,
        )
