"""Launches that are made ready once: the second one hands the device what the first one did, past Triton's search."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hiddenkey_rs.ops.triton_launch import Ready

# A driver that compiles for sm_90 and launches nothing: what it is asked to launch is printed.
FAKED = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

LAUNCHED, SEARCHED = [], []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 32, 0, 1024
    def unload_module(self, module):
        pass

class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name
    def __call__(self, x, y, z, stream, function, *rest):
        # Behind what Triton says of the kernel: pointers (tensors, or numbers), numbers, constants.
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in rest[4:]]
        LAUNCHED.append([self.name, x, y, z, stream, values])

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 7

driver.set_active(Driver())
search = JITFunction.run
def run(self, *args, **named):
    SEARCHED.append(self.fn.__name__)
    return search(self, *args, **named)
JITFunction.run = run

from hiddenkey_rs.ops import triton_gather, triton_hidden, triton_launch
triton_launch._interpreted = lambda: True  # so that tensors of the CPU are taken
"""
HIDDEN = """
keys, ids, places = torch.tensor([[3, 4]]), torch.arange(8), torch.arange(8)
states, counts = torch.ones(8, 32), torch.zeros((), dtype=torch.int64)
def drop(states):
    return triton_hidden._launch(states, None, (keys, ids, places), None, 2.0, 100, counts)
first = [drop(states).data_ptr() for _ in range(3)]
print(json.dumps({"searched": SEARCHED, "launched": LAUNCHED, "results": first}))
SEARCHED.clear()
drop(torch.ones(8 * 32 + 1)[1:].view(8, 32))  # four bytes off: what was compiled for multiples of 16 may not run
drop(torch.ones(9, 32))
print(json.dumps(SEARCHED))
"""
LISTS = """
table, keep = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 3, 5, dtype=torch.bool)
for _ in range(2):
    triton_gather.kept_lists(table, keep, cross=False)
print(json.dumps([SEARCHED, [entry[1:4] for entry in LAUNCHED]]))
"""


def faked(script: str) -> list[str]:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FAKED + script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_second_launch_is_the_first_one_again() -> None:
    found, others = map(json.loads, faked(HIDDEN))
    assert found["searched"] == ["drop_kernel"]
    first, *rest = found["launched"]
    assert len(rest) == 2
    assert first[:5] == ["drop_kernel", 1, 1, 1, 7]
    for number, again in enumerate(rest, 1):
        expected = [*first[5]]
        assert expected[2] == found["results"][0]
        expected[2] = found["results"][number]  # the result's own memory
        assert again == [*first[:5], expected]
    assert others == ["drop_kernel"] * 2


def test_lists_are_launched_again() -> None:
    assert faked(LISTS) == ['[["list_kernel"], [[6, 1, 1], [6, 1, 1]]]']


def test_what_is_ready_does_not_grow_for_ever() -> None:
    ready = Ready()
    for number in range(3000):
        assert ready.keep(number, number) == number
    assert 0 < len(ready) <= 2048
    assert ready[2999] == 2999
