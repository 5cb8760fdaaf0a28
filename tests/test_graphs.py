"""What CUDA graphs ask of a compiled model: what changes with every step stands at no address that a graph takes for fixed."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager
from torch.fx import GraphModule

import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import prepared
from hiddenkey_rs.attachment.checks import CompiledParts
from hiddenkey_rs.transfer import to_device

IDS = [5, 1 << 35, 7]


class Graphs:
    """Stands for the compiler: notes which integers and flags the graphs are given, and which of them they take for fixed."""

    def __init__(self) -> None:
        self.given: dict[bool, list[tuple[str, bool, tuple[int, ...]]]] = {}

    def __call__(self, graph: GraphModule, examples: list[Any]) -> Any:
        return compile_fx(graph, examples, inner_compile=self.inner)

    def inner(self, graph: GraphModule, examples: list[Any], **how: Any) -> Any:
        fixed = set(how.get("static_input_idxs") or ())
        places = enumerate(node for node in graph.graph.nodes if node.op == "placeholder")
        facts = [(place, node, node.meta.get("val")) for place, node in places]
        self.given[bool(how.get("is_backward"))] = [
            (node.name, place in fixed, tuple(value.shape))
            for place, node, value in facts
            if isinstance(value, torch.Tensor) and not value.is_floating_point()
        ]
        return boxed_nop(graph, examples)


@pytest.fixture(params=["bert", "llama"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch._dynamo.reset()
    found = families.build(request.param, num_hidden_layers=2)
    if request.param == "bert":
        found.config.problem_type = "single_label_classification"
    return found


def run(model: nn.Module) -> Graphs:
    graphs = Graphs()
    handle = hk.attach(model, "hiddenkey-minus", stock_dropout="off")
    model.compile(fullgraph=True, backend=graphs)
    with handle.step(0, IDS):
        loss = handle.loss(**families.batch(model.config.model_type))
    loss.backward()
    return graphs


def test_masks_and_places_are_inputs_like_the_batch(model: nn.Module) -> None:
    batch = families.batch(model.config.model_type)
    rows = batch["input_ids"].numel()
    forward = run(model).given[False]
    moving = [shape for _, fixed, shape in forward if not fixed]
    assert moving.count((rows,)) >= 2  # every token's example and position
    assert any(shape[-2:] == (1, 2) for shape in moving)  # keys
    fixed = [shape for _, fixed, shape in forward if fixed]
    assert not [shape for shape in fixed if shape and shape[0] == rows]
    assert (4 if model.config.model_type == "bert" else 2, 3) in fixed  # what is counted, the same in every step


def test_backward_asks_for_nothing_that_the_step_brought(model: nn.Module) -> None:
    drawn = ("primals", "arg")

    def kept() -> set[tuple[int, ...]]:
        rows = families.batch(model.config.model_type)["input_ids"].numel()
        found = [shape for name, _, shape in run(model).given[True] if name.startswith(drawn)]
        return {shape for shape in found if shape == (rows,) or shape[-1:] == (2,)}

    with patch.object(prepared, "GRAPHED", ("cpu",)):  # as on a device that has them
        assert not kept()
    hk.detach(model)
    model._compiled_call_impl = None
    torch._dynamo.reset()
    assert kept()  # on a CPU, which has none, nothing is copied


def test_one_thread_at_a_time_calls_a_compiled_model() -> None:
    said: list[str] = []

    def call() -> None:
        try:
            with prepared.called_with([None]):
                pass
        except hk.StateError as error:
            said.append(str(error))

    with prepared.called_with([None]):
        with prepared.called_with([None, None]):  # a model inside another's call
            assert len(prepared.CALLED) == 2
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert "another thread is calling a compiled model" in said[0]
    call()
    assert len(said) == 1
    assert prepared.CALLED == []


def test_parts_that_are_compiled_later_are_found(model: nn.Module) -> None:
    parts = CompiledParts()
    assert not parts.anywhere(model)
    layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[1]
    layer.compile(backend="eager")
    assert parts.anywhere(model)
    layer._compiled_call_impl = None
    assert not parts.anywhere(model)
    inner = next(iter(model.children()))
    name = next(iter(model._modules))
    setattr(model, name, torch.compile(inner, backend="eager"))
    assert parts.anywhere(model)
    setattr(model, name, inner)
    assert not parts.anywhere(model)
    other = nn.Sequential(model)
    model.compile(backend="eager")
    assert parts.anywhere(other)
    known = weakref.ref(other)
    del other
    assert known() is None, "what asks keeps no model alive that it was asked about"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["hiddenkey-minus", "hiddenkey"])
def test_graphs_are_recorded_once(model: nn.Module, preset: str) -> None:
    model.cuda()
    twin = copy.deepcopy(model)
    eager, handle = (hk.attach(each, preset, stock_dropout="off") for each in (twin, model))
    model.compile(mode="reduce-overhead")
    batches = [families.batch(model.config.model_type, seed=number) for number in range(8)]
    recorded = []
    record = CUDAGraphTreeManager.record_function
    with patch.object(CUDAGraphTreeManager, "record_function", lambda *a: recorded.append(step) or record(*a)):
        for step, batch in enumerate(batches):
            losses = []
            for each in (eager, handle):
                with each.step(step, IDS):
                    loss = each.loss(**{name: part.cuda() for name, part in batch.items()})
                loss.backward()
                losses.append(float(loss))
                each.model.zero_grad()
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert recorded
    assert max(recorded) < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_to_a_device_arrive_whole() -> None:
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    draw = torch.Generator().manual_seed(0)
    sent = []
    for number in range(40):
        for _ in range(5):
            busy = busy @ busy / 4096  # the device is behind, and copies wait
        size = (10, 70_000, 300_001)[number % 3]
        host = torch.randint(0, 2, (size,), generator=draw)
        given = host.bool() if number % 2 else host
        arrived = to_device(given, device)
        sent.append((given.clone(), arrived))
        given.zero_()
    assert all(torch.equal(arrived.cpu(), expected) for expected, arrived in sent)
