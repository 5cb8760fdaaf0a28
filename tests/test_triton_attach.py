"""Attached models on the Triton kernels: the cases run in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import importlib.util
import os

import pytest

import families
import hiddenkey_rs as hk
from test_triton_attention import run_cases


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_cases_in_the_interpreter() -> None:
    run_cases("triton_attach_cases.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_compiled_cases_in_the_interpreter() -> None:
    run_cases("triton_compile_cases.py")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_a_model_that_is_not_on_a_gpu_is_refused_untouched() -> None:
    model = families.build("llama")
    before = model.config._attn_implementation
    with pytest.raises(hk.ConfigError, match=r"it needs tensors on a CUDA device, not cpu .*impl='triton'"):
        hk.attach(model, impl="triton")
    guided = hk.HiddenKeyConfig(hidden=hk.HiddenDrop(pattern="span", rate=0.1, start="attention"))
    with pytest.raises(hk.ConfigError, match="needs the attention weights"):
        hk.attach(model, guided, impl="triton")
    assert model.config._attn_implementation == before
    hk.attach(model).detach()
