"""Triton HiddenCut: its cases run in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from hiddenkey_rs import ConfigError, MaskKey, ops
from hiddenkey_rs.ops import triton_hidden
from test_triton_attention import run_cases


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_cases_in_the_interpreter() -> None:
    run_cases("triton_hidden_cases.py")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_a_choice_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Triton cannot drop these hidden states: .*; use impl='auto'"):
        triton_hidden.drop_rows(torch.ones(2, 3), torch.ones(2, dtype=torch.bool), 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_equals_the_unfused_operations_bit_for_bit(dtype: torch.dtype) -> None:
    hidden, residual = (torch.randn(37, 300, device="cuda").to(dtype) for _ in range(2))
    keys = torch.tensor([MaskKey(seed=1, site="ffn").derive()], device="cuda")
    samples, positions = torch.full((37,), 9, device="cuda"), torch.arange(37, device="cuda")
    keep = ops.row_keep(keys[0], samples, positions, 300, 20000)
    scale = 65536 / (65536 - 20000)
    out, kept = triton_hidden.drop_elements(
        hidden, keys, samples, positions, 20000, scale, residual=residual, count=True
    )
    assert torch.equal(out, residual + ops.drop_hidden(hidden, keep, scale))
    assert int(kept) == int(keep.sum())
