"""What CUDA graphs ask of a compiled model: what changes with every step stands at no address that a graph takes for fixed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import boxed_nop
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import prepared

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
