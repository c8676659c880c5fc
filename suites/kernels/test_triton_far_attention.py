"""Attention in Triton on addresses that 32 bits do not reach (spec 5.2 C06), without allocating that much.

Memory of more than 2^31 elements is reserved, and only the pages of a few far rows are ever touched. A tensor of one
element stands where the memory begins: it is where the kernels count from, and the interpreter, which copies back the
whole storage of every argument, then copies four bytes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only.")

ROOT = Path(__file__).parents[2]
# Each program runs in a process of its own, which measures what it held.
FAR = """
import mmap, sys, types
import torch
from torch.testing import assert_close

# The package without its models: importing these would take most of the time.
sys.modules["optimized"] = types.ModuleType("optimized")
sys.modules["optimized"].__path__ = [PACKAGE]
kept = []

def reserve(elements):
    # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    kept.append(mmap.mmap(-1, 4 * elements, flags=0x02 | 0x20 | 0x4000))
    return kept[-1]

def start_of(memory):
    return torch.frombuffer(memory, dtype=torch.float32, count=1)

def at(memory, offset, *shape):
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=4 * offset).view(shape)

def sparse(forward_module, backward_module):
    forward, backward = forward_module, backward_module
    rows, slots, H, D, V, K = 131_072, 4_000_000, 128, 576, 512, 32
    row = rows - 1
    q, out, dout, dq = (reserve(rows * H * width) for width in (D, V, V, D))
    kv, dkv = reserve(slots * D), reserve(slots * D)
    query, grad = torch.randn(H, D), torch.randn(H, V)
    at(q, row * H * D, H, D).copy_(query)
    at(dout, row * H * V, H, V).copy_(grad)
    latent = torch.randn(K, D)
    at(kv, (slots - K) * D, K, D).copy_(latent)
    indices = torch.full((rows, K), -1, dtype=torch.int32)
    indices[row] = torch.arange(slots - K, slots)
    lse = start_of(reserve(rows * H))
    tile = forward.Tile(128, 32, 8, 2)
    constants = forward.forward_constants(D, V, H, tile)
    forward.sparse_mla_forward_kernel[(1,)](
        start_of(q), start_of(kv), indices, start_of(out), lse, row, K, 0.05, **constants)
    leaf_q, leaf_kv = query.double().requires_grad_(), latent.double().requires_grad_()
    p = (leaf_q @ leaf_kv.T * 0.05).softmax(-1)
    expected = p @ leaf_kv[:, :V]
    expected.backward(grad.double())
    near = dict(atol=1e-4, rtol=1e-4, check_dtype=False)
    assert_close(at(out, row * H * V, H, V), expected.detach(), **near)
    for exact in (False, True):
        weights, slopes = torch.zeros(1, K, H), torch.zeros(1, K, H)
        backward.sparse_mla_probabilities_kernel[(1,)](
            start_of(q), start_of(kv), indices, start_of(out), start_of(dout), lse, weights, slopes, row, K, 0.05,
            **constants, EXACT=exact)
        assert_close(weights[0].T, p.detach(), **near)
    backward.sparse_mla_dq_kernel[(1,)](start_of(kv), indices, slopes, start_of(dq), row, K, **constants)
    assert_close(at(dq, row * H * D, H, D), leaf_q.grad, **near)
    for columns in backward.dkv_constants(H, D, V, tile, False):
        blocks = -(-(columns["LAST"] - columns["FIRST"]) // columns["BLOCK_X"])
        backward.sparse_mla_dkv_kernel[(blocks,)](
            start_of(q), start_of(dout), indices, weights, slopes, start_of(dkv), row, K, **columns)
    assert_close(at(dkv, (slots - K) * D, K, D), leaf_kv.grad, **near)

def dense():
    # So many heads that 64 rows are as far apart as 131,072 rows of 128 heads.
    from optimized.kernels import dense_mla_backward as backward, dense_mla_forward as forward
    L, H, D, V, first = 64, 262_144, 192, 128, 60
    memory = {name: reserve(L * H * width) for name, width in
              dict(q=D, k=D, v=V, out=V, dout=V, dq=D, dk=D, dv=V).items()}
    small = {name: torch.randn(L - first, width) for name, width in dict(q=D, k=D, v=V, dout=V).items()}
    for name, value in small.items():
        for i, line in enumerate(value):
            at(memory[name], (first + i) * H * len(line), len(line)).copy_(line)
    def rows(name, width):
        return torch.stack([at(memory[name], i * H * width, width) for i in range(first, L)])
    bounds = torch.zeros(1, L, 2, dtype=torch.int32)
    bounds[0, first:] = torch.tensor([first, L])
    bits = torch.full((1, L, 4), -1, dtype=torch.int32)
    lse, delta = start_of(reserve(L * H)), start_of(reserve(L * H))
    tile = forward.Tile(64, 64, 8, 2)
    constants = forward.constants(H, D, V, True, False, tile)
    ranges = forward.tile_ranges(bounds, L, 64)
    begin = {name: start_of(block) for name, block in memory.items()}
    inputs = (begin["q"], begin["k"], begin["v"], bounds, ranges, bits)
    numbers = (L, L, 4, 0.05)
    forward.dense_mla_forward_kernel[(1,)](*inputs, begin["out"], lse, *numbers, **constants)
    q, k, v = (small[name].double().requires_grad_() for name in "qkv")
    expected = (q @ k.T * 0.05).softmax(-1) @ v
    expected.backward(small["dout"].double())
    near = dict(atol=1e-4, rtol=1e-4, check_dtype=False)
    assert_close(rows("out", V), expected.detach(), **near)
    for exact in (False, True):
        backward.dense_mla_dq_kernel[(1,)](
            *inputs, begin["out"], begin["dout"], lse, delta, begin["dq"], *numbers, **constants, EXACT=exact)
        assert_close(rows("dq", D), q.grad, **near)
    backward.dense_mla_dkv_kernel[(1,)](
        *inputs, begin["dout"], lse, delta, begin["dk"], begin["dv"], *numbers, **constants)
    assert_close(rows("dk", D), k.grad, **near)
    assert_close(rows("dv", V), v.grad, **near)
"""
FAR_OURS = """
from optimized.kernels import sparse_mla_backward, sparse_mla_forward
sparse(sparse_mla_forward, sparse_mla_backward)
dense()
# Not ru_maxrss, which remembers the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
assert peak < 2**20, f"{peak} KiB were resident"
print("far rows are right")
"""
FAR_32_BITS = """
import narrow_forward, narrow_backward
sparse(narrow_forward, narrow_backward)
print("far rows are right")
"""


def run_far(code, folder):
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"PACKAGE = {str(ROOT / 'optimized')!r}" + FAR + code],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_offsets_beyond_32_bits(tmp_path):
    ended = run_far(FAR_OURS, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "far rows are right" in ended.stdout


@pytest.mark.slow
def test_offsets_of_32_bits_are_noticed(tmp_path):
    for module in ("forward", "backward"):
        source = (ROOT / f"optimized/kernels/sparse_mla_{module}.py").read_text()
        narrow = source.replace(".to(tl.int64)", "").replace("optimized.kernels.sparse_mla_forward", "narrow_forward")
        assert narrow != source
        (tmp_path / f"narrow_{module}.py").write_text(narrow)
    ended = run_far(FAR_32_BITS, tmp_path)
    assert ended.returncode != 0
    assert "far rows are right" not in ended.stdout
