"""Triton attention: its cases run in Triton's interpreter, in a process of their own.

TRITON_INTERPRET is read when Triton is imported, which another test of this process may have done already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hiddenkey_rs import ConfigError
from hiddenkey_rs.ops import triton_attention

HERE = Path(__file__).parent


def run_cases(name: str) -> None:
    """Run a file of cases under the interpreter; its failures, if any, are this test's message."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(HERE / name),
    ]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_cases_in_the_interpreter() -> None:
    run_cases("triton_attention_cases.py")


def test_float64_is_an_obstacle() -> None:
    states = torch.ones(1, 1, 2, 16, dtype=torch.float64)
    assert "not torch.float64" in str(triton_attention.obstacle(states, states, states))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_a_choice_that_cannot_be_met_is_an_error() -> None:
    states = torch.ones(1, 1, 2, 16)
    table = torch.tensor([[0, 0, 2, 0, 2, 7, 0, 0]])
    with pytest.raises(ConfigError, match=r"Triton cannot compute this attention: .*; use impl='auto'"):
        triton_attention.attention(states, states, states, triton_attention.Documents(table, 2, 2, 2))


def test_without_triton_the_operators_import_and_say_why(tmp_path: Path) -> None:
    # A finder in front of all others hides Triton from a new process.
    script = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import importlib, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch
import hiddenkey_rs.ops
from hiddenkey_rs.ops import triton_attention, triton_attention_backward, triton_hidden
x = torch.ones(1, 1, 2, 16)
print(triton_attention.obstacle(x, x, x))
print(triton_hidden.obstacle(x))
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["Triton is not installed"] * 2


# Built for GPUs without having one: what the interpreter lets pass, the compiler may not.
COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import torch
from hiddenkey_rs.ops import triton_attention_backward, triton_attention_forward, triton_gather_kernel
from hiddenkey_rs.ops import triton_hidden_kernel, triton_launch

POINTERS = {"log_kept": "fp32", "log_allowed": "fp32", "deltas": "fp32", "lost_rows": "i8", "flags": "u8", "lists": "i32"}
POINTERS |= dict.fromkeys(("counts", "documents", "keys", "samples", "positions"), "i64")
LIMIT = {90: 227 << 10, 89: 99 << 10}
STATES = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value", "hidden", "residual")

def build(kernel, constants, options, flags="u8", states="bf16", arch=90):
    POINTERS["flags"] = flags
    types, hints = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else "fp32" if name in ("scale", "scaling") else "i32"
        kind = "*" + states if name in STATES else "*" + POINTERS[name] if name in POINTERS else kind
        types[name] = kind
        if kind[0] == "*" or name.endswith(("_row", "_head", "_token")):
            hints[place,] = [["tt.divisibility", 16]]
    built = compile(ASTSource(kernel, types, constants, hints), target=GPUTarget("cuda", arch, 32), options=options)
    assert built.metadata.shared <= LIMIT[arch], (kernel, constants, built.metadata.shared)
    return built

kernels = {
    "forward": triton_attention_forward.forward_kernel,
    "query": triton_attention_backward.query_gradient_kernel,
    "key": triton_attention_backward.key_gradient_kernel,
}
cases = [("forward", 64, True), ("query", 64, True), ("key", 64, True)]
cases = [(*case, 1) for case in cases] + [("forward", 64, False, 3), ("query", 128, False, 3), ("key", 64, False, 3)]
cases = [(*case, torch.bfloat16, 90) for case in cases]
cases += [(name, 256, False, 2, torch.bfloat16, 90) for name in ("forward", "key")]
cases += [("key", 128, False, 1, torch.bfloat16, 89), ("key", 128, False, 2, torch.float32, 90)]
part, parts = map(int, sys.argv[1:])
for name, head, dropattention, pattern, dtype, arch in cases[part::parts]:
    kernel = kernels[name]
    rows, columns, warps, stages = triton_launch.tiles(name, head, dtype, LIMIT[arch], pattern == 1, True)
    constants = {"HEAD": head, "HEAD_V": head, "BLOCK_D": head, "BLOCK_V": head, "ROWS": rows, "COLUMNS": columns}
    constants |= {"PATTERN": pattern, "DROPATTENTION": dropattention, "CAUSAL": True, "WINDOW": dropattention, "OWN": True}
    constants |= {"PRECISION": "tf32x3"} | ({"COUNT": True} if name == "forward" else {})
    stages += pattern == 3 and name != "key"
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    states = "fp32" if dtype == torch.float32 else "bf16"
    build(kernel, constants, options, "i32" if pattern == 3 else "u8", states, arch)
if part:
    sys.exit()
build(triton_gather_kernel.list_kernel, {"OWN": False, "BLOCK": 1024}, {"num_warps": 4})
element = {"FEATURES": 4096, "ROWS": 32, "COLUMNS": 128, "ELEMENT": True, "RESIDUAL": True, "COUNT": True}
build(triton_hidden_kernel.drop_kernel, element, {"num_warps": 4, "enable_fp_fusion": False})
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("part", range(2))
def test_kernels_compile_for_a_gpu_that_is_not_here(part: int, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What the assembler would make faster nobody runs.
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "DISABLE_PTXAS_OPT": "1"}
    command = [sys.executable, "-c", COMPILE, str(part), "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {file.stem for file in tmp_path.rglob("*.cubin")}
    assert {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"} <= kernels
    assert ({"list_kernel", "drop_kernel"} <= kernels) == (part == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
def test_a_gpu_equals_the_reference(position: str, size: int, dtype: torch.dtype) -> None:
    import triton_attention_cases as cases

    if dtype == torch.float32 and size > 64:
        from hiddenkey_rs.ops.triton_launch import widest_head

        if size > widest_head(torch.empty(0, device="cuda")):
            pytest.skip("float32 heads so wide do not fit into shared memory")
    # 3xTF32 keeps 21 bits; halves round weights, logit gradients and results once each.
    step = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    close = {"rtol": 4 * step, "atol": 8 * step}
    how = {"position": position, "size": size, "dtype": dtype, "close": close, "device": "cuda"}
    for pattern in ("element", "column", *(["column, kept"] if position == "dropkey" else [])):
        cases.compare(cases.BATCHES["packed"], pattern=pattern, causal=True, **how)
        heads = "query" if pattern == "column, kept" else "group"
        cases.compare(cases.BATCHES["split"], pattern=pattern, window=30, heads=heads, **how)
        cases.compare(cases.BATCHES["left padding"], cases.BATCHES["right padding"], pattern=pattern, **how)
