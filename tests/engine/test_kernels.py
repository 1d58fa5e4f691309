"""The C kernels and their torch twins: the same operation, twice."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_harness import small_config

from pdrelay.engine import kernels
from pdrelay.engine.kernels import build as kernel_build
from pdrelay.engine.kernels.workspace import Workspace
from pdrelay.engine.layers import HeadNorms, KernelOps, TorchOps, rope_table

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ops():
    loaded = kernels.load_kernels()
    assert loaded is not None, kernels.describe()
    return KernelOps(loaded)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 120),
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 90),
    with_bias=st.booleans(),
)
def test_linear(ops, rows, out_features, in_features, with_bias):
    x, weight = random(rows, in_features), random(out_features, in_features, seed=1)
    bias = random(out_features, seed=2) if with_bias else None
    actual = ops.linear("l", weight, bias)(x)
    wanted = TorchOps().linear("l", weight.double(), None if bias is None else bias.double())(
        x.double()
    )
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)
    alone = torch.stack([ops.linear("l", weight, bias)(row[None])[0].clone() for row in x[-7:]])
    assert torch.equal(alone, ops.linear("m", weight, bias)(x)[-7:])


@pytest.mark.parametrize("width", [16, 30, 256])
@pytest.mark.parametrize("with_x", [True, False])
def test_add_rms_norm(ops, width, with_x):
    x = random(5, width) if with_x else None
    residuals = [random(5, width, seed=1) for _ in range(2)]
    weight = random(width, seed=2)
    results = [
        o.add_rms_norm(x, r, weight, 1e-5)
        for o, r in zip((ops, TorchOps()), residuals, strict=True)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert torch.equal(*residuals)


@pytest.mark.parametrize("width", [16, 35, 768])
def test_silu_mul(ops, width):
    gate_up = random(4, 2 * width) * 8
    gate_up[0, :8] = torch.tensor([0.0, -0.0, 200.0, -200.0, 88.0, -88.0, 1e30, -1e30])
    gate_up[0, width : width + 8] = 1.0
    wanted = TorchOps().silu_mul(gate_up.double())
    torch.testing.assert_close(ops.silu_mul(gate_up).double(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("head_dim", [12, 32])
def test_rope_write_kv(ops, with_norms, head_dim):
    config = small_config(head_dim=head_dim)
    table = rope_table(config, CPU)
    norms = HeadNorms(random(head_dim, seed=5), random(head_dim, seed=6), 1e-6)
    slots = torch.tensor([17, 3, 39, 8])
    positions = torch.tensor([0, 511, 3, 77])
    results = []
    for o in (ops, TorchOps()):
        pages = torch.zeros(5, 2, 8, 2, head_dim)
        qkv = random(4, 8 * head_dim)
        q = o.rope_write_kv(qkv, positions, slots, table, norms if with_norms else None, pages)
        results.append((q, pages))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    written = results[0][1].transpose(1, 2).flatten(0, 1).flatten(1).abs().sum(dim=1).nonzero()
    assert written[:, 0].tolist() == sorted(slots.tolist())


def test_workspace_reuses_and_grows():
    workspace = Workspace()
    small = workspace.take("a", 2, 3)
    assert workspace.take("a", 2, 3) is small
    assert workspace.take("b", 2, 3).data_ptr() != small.data_ptr()
    large = workspace.take("a", 20, 3)
    assert large.shape == (20, 3)
    assert workspace.take("a", 2, 3).data_ptr() == large.data_ptr()


SOURCE = "int answer(void) { return 42; }\n"


def test_build_is_cached_by_source(tmp_path):
    source = tmp_path / "k.c"
    source.write_text(SOURCE)
    first = kernel_build.build(source, tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert kernel_build.build(source, tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text(SOURCE.replace("42", "43"))
    assert kernel_build.build(source, tmp_path / "cache") != first


def test_concurrent_builds_leave_one_library(tmp_path):
    source = tmp_path / "k.c"
    source.write_text(SOURCE)
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(kernel_build.build(source, tmp_path / "cache"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4 and len(set(results)) == 1
    assert list((tmp_path / "cache").iterdir()) == [results[0]]


def test_broken_source_is_a_one_line_error(tmp_path):
    source = tmp_path / "k.c"
    source.write_text("nonsense\n")
    with pytest.raises(kernel_build.BuildError) as caught:
        kernel_build.build(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_the_engine_runs_on_torch(tmp_path):
    code = (
        "import torch\n"
        "from pdrelay.engine import kernels\n"
        "from pdrelay.engine.models import build_model\n"
        "from pdrelay.model.config import load_model_config\n"
        "print(kernels.available(), kernels.describe())\n"
        "build_model('tiny', load_model_config('tiny'))\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("CC", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False torch (no C compiler")
