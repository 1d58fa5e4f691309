"""The CUDA runner on the Triton kernels: in the interpreter where there is no GPU.

Fresh prompts and decodes against torch's operations; bfloat16 on a GPU, float32 here.
"""

from __future__ import annotations

import pytest
import torch
from triton_harness import DEVICE, ON_GPU  # first: it decides how triton runs

from pdrelay.core.block_manager import BlockManager
from pdrelay.core.messages import EngineRequest
from pdrelay.core.request import Request
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.scheduler import Scheduler, SchedulerConfig
from pdrelay.core.token_ids import pack_ids
from pdrelay.engine.accelerator import HostAccelerator
from pdrelay.engine.attention import AttentionShape
from pdrelay.engine.backend import cuda_backend
from pdrelay.engine.cuda_runner import CudaRunner
from pdrelay.engine.kernels.gpu import TorchKernels, TritonKernels
from pdrelay.engine.models import build_model
from pdrelay.engine.step_executor import StepExecutor, StepLimits
from pdrelay.model.config import kv_layout, parse_model_config

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}


def serve(kernels, num_requests, small_rows):
    """Tokens of prompts prefilled together, 4 each."""
    config = parse_model_config(SHAPE, "small")
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
    cpu = torch.device("cpu")
    backend = cuda_backend(shape, torch.float32, cpu, kernels)
    backend.ops.small_rows = small_rows
    model = build_model("small", config, load_format="dummy", seed=3, backend=backend)
    backend.qkv_buffer.reserve(64)
    kernels.reserve(4, shape.num_heads, shape.head_dim, config.vocab_size)
    limits = StepLimits(4, 64, 128, 16)
    pool = torch.zeros(kv_layout(config, 16, 16, "float32").shape)
    executor = StepExecutor(model, pool, HostAccelerator(), limits)
    if num_requests == 1:  # a step without graphs otherwise
        executor.capture_prefill_graphs()
    executor.capture_graphs()
    runner = CudaRunner(executor, HostAccelerator(), limits)
    scheduler = Scheduler(SchedulerConfig(4, 64, 16), BlockManager(16))
    for i in range(num_requests):
        source = EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=pack_ids(range(i, 20 + i)),
            params=SamplingParams(max_tokens=4, seed=0, temperature=0.0),
            arrived_ns=0,
        )
        scheduler.add(Request(source))
    outputs = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        for token in scheduler.update(plan, runner.launch(plan, None, None).result().token_ids):
            outputs.setdefault(token.request.request_id, []).append(token.token_id)
    return outputs


@pytest.mark.skipif(ON_GPU, reason="runs in the interpreter; tests/engine/test_cuda_gpu.py on GPUs")
@pytest.mark.parametrize(("num_requests", "small_rows"), [(1, 1), (3, 1), (3, 8)])
def test_triton_kernels_give_torchs_tokens(num_requests, small_rows):
    wanted = serve(TorchKernels(), num_requests, 0)
    assert serve(TritonKernels(DEVICE), num_requests, small_rows) == wanted
