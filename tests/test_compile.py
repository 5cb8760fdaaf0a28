"""torch.compile after attach: one graph a variant, never a new one as steps advance, and eager's masks in it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import families
import hiddenkey_rs as hk
from families import ENCODERS
from hiddenkey_rs import ops

IDS = np.array([3, 9, 1 << 35])
ALL = {"layers": "all"}
BOTH = hk.Consistency("kl", gradient="both")
CONFIGS = {
    "minus": hk.HiddenKeyConfig.preset("hiddenkey-minus"),
    "hiddenkey": hk.HiddenKeyConfig.preset("hiddenkey"),
    "structured": hk.HiddenKeyConfig(
        attention=hk.AttentionDrop(pattern="span", rate=0.3),
        hidden=hk.HiddenDrop("column", 0.3),
        consistency=BOTH,
        **ALL,
    ),
    "element": hk.HiddenKeyConfig(
        attention=hk.AttentionDrop(pattern="element", rate=0.3),
        hidden=hk.HiddenDrop("span", 0.3),
        input=hk.ElementDrop(0.2),
        output=hk.ElementDrop(0.2),
        consistency=None,
        seed=(1 << 64) - 1,
        **ALL,
    ),
    "guided": hk.HiddenKeyConfig(
        attention=hk.AttentionDrop(position="dropattention", rate=0.3),
        hidden=hk.HiddenDrop("span", 0.3, start="attention"),
        consistency=hk.Consistency("js"),
        **ALL,
    ),
}
LAYERS = {"gpt2": {"n_layer": 2}, "bart": {"encoder_layers": 2, "decoder_layers": 2}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def build(family: str) -> nn.Module:
    model = families.build(family, **LAYERS.get(family, {"num_hidden_layers": 2}))
    if family in ENCODERS:
        # transformers writes this into the config in the first call with labels, and so compiles anew in the second.
        model.config.problem_type = "single_label_classification"
    return model


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, adapter).train()


def checkpointed(model: nn.Module) -> nn.Module:
    model.config.use_cache = False  # or transformers logs that it switches it off, which no graph can
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batches(family: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one shape and other lengths; in some an example ends before the last column, in one on the left."""
    found = []
    for step in range(steps):
        batch = families.batch(family, side="left" if step == 2 else "right", seed=step)
        if step == 1:
            batch["attention_mask"][0, -1] = 0
        found.append(batch)
    return found


class Pair:
    """An attached model that is compiled, and its twin that is not."""

    def __init__(
        self,
        model: nn.Module,
        config: hk.HiddenKeyConfig,
        compiled: Callable[[nn.Module], nn.Module] | None = None,
        backend: Any = "aot_eager",
    ) -> None:
        twin = copy.deepcopy(model)
        self.eager = hk.attach(twin, config, stock_dropout="off")
        self.handle = hk.attach(model, config, stock_dropout="off")
        self.counter = CompileCounterWithBackend(backend)
        self.model = model
        if compiled is None:
            model.compile(fullgraph=True, backend=self.counter)
        else:
            self.model = compiled(model)

    def losses(self, step: int, batch: dict[str, torch.Tensor], ids: Any = None, **how: Any) -> list[torch.Tensor]:
        """Loss and gradients of both, eager's first."""
        results = []
        for handle, model in ((self.eager, self.eager.model), (self.handle, self.model)):
            handle.model.zero_grad()
            with handle.step(step, IDS + step if ids is None else ids, **how):
                loss = handle.compute(batch, model=model).loss
            loss.backward()
            gradients = {name: p.grad for name, p in handle.model.named_parameters() if p.grad is not None}
            assert gradients
            results.append({"loss": loss.detach(), **gradients})
        return results

    def check(self, family: str, steps: int = 3, **tolerance: float) -> None:
        tolerance = tolerance or {"rtol": 0, "atol": 0}
        for step, batch in enumerate(batches(family, steps)):
            expected, got = self.losses(step, batch)
            torch.testing.assert_close(got, expected, **tolerance)
        assert self.handle.realised() == self.eager.realised() != {}
        calls = [[row.calls for row in handle.report().rows] for handle in (self.handle, self.eager)]
        assert calls[0] == calls[1]


def variants(config: hk.HiddenKeyConfig) -> int:
    return 1 if config.consistency is None or config.consistency.gradient == "both" else 2


@pytest.mark.parametrize(
    ("family", "preset"),
    [("bert", "hiddenkey"), ("llama", "hiddenkey"), ("gpt2", "minus")],
)
def test_presets(family: str, preset: str) -> None:
    pair = Pair(build(family), CONFIGS[preset])
    pair.check(family)
    # fullgraph: a break would have been an error. js and kl have a second pass, which needs no gradient.
    assert pair.counter.frame_count == variants(CONFIGS[preset])


@pytest.mark.parametrize(("family", "name"), [("llama", "structured"), ("bert", "element"), ("bert", "guided")])
def test_other_patterns_and_positions(family: str, name: str) -> None:
    pair = Pair(build(family), CONFIGS[name])
    pair.check(family)
    assert pair.counter.frame_count == variants(CONFIGS[name])


def test_an_encoder_decoder_and_a_shared_layer() -> None:
    # What all decoder layers read gets its gradients in another order: the last bit of a sum.
    Pair(build("bart"), CONFIGS["minus"]).check("bart", steps=1, rtol=1e-5, atol=1e-7)
    Pair(build("albert"), CONFIGS["minus"]).check("albert", steps=1)


def test_through_peft() -> None:
    pair = Pair(lora(build("llama")), CONFIGS["hiddenkey"])
    pair.check("llama", steps=2)
    assert pair.counter.frame_count == 2


def linears(graph: torch.fx.GraphModule) -> int:
    return sum("linear" in str(node.target) for node in graph.graph.nodes)


# Of each llama layer 4 + 3, of bart's 4 + 2 (encoder) and 4 + 4 + 2, and the head.
@pytest.mark.parametrize(("family", "sizes"), [("llama", (29, 8)), ("bart", (65, 11))])
def test_the_second_pass_runs_dropping_layers_alone(family: str, sizes: tuple[int, int]) -> None:
    model, config = families.build(family), hk.HiddenKeyConfig(layers=[3])
    own = [layer.forward.__func__ for layer in layers_of(model)]
    recorder = EagerAndRecordGraphs()
    pair = Pair(model, config, backend=recorder)
    pair.check(family, steps=2, **({} if family == "llama" else {"rtol": 1e-5, "atol": 1e-7}))
    assert tuple(linears(graph) for graph in recorder.graphs) == sizes
    pair.handle.detach()
    assert [layer.forward.__func__ for layer in layers_of(model)] == own
    assert not any("forward" in vars(layer) for layer in layers_of(model))


def test_a_call_past_the_graph_costs_no_new_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    pair = Pair(families.build("llama"), hk.HiddenKeyConfig(layers=[3]), lambda m: torch.compile(m, backend=counter))
    batch = families.batch("llama")
    expected = pair.losses(0, batch)[1]
    with pair.handle.step(0, IDS):
        assert torch.equal(pair.handle.compute(batch).loss.detach(), expected["loss"])
    torch.testing.assert_close(pair.losses(0, batch)[1], expected, rtol=0, atol=0)
    assert counter.frame_count == 2


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Layer")]


@pytest.mark.parametrize("why", ["checkpointing", "js"])
def test_what_a_graph_cannot_share_runs_again(why: str) -> None:
    model = families.build("llama")
    if why == "checkpointing":
        checkpointed(model)
    config = hk.HiddenKeyConfig(layers=[3], consistency=hk.Consistency("js" if why == "js" else "kl"))
    # js: the stock model's attention sums in another order
    Pair(model, config).check("llama", steps=1, **({} if why != "js" else {"rtol": 1e-4, "atol": 1e-6}))
    assert not any("forward" in vars(layer) for layer in layers_of(model))


def test_the_wrapper_of_torch_compile() -> None:
    pair = Pair(build("bert"), CONFIGS["minus"], lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"))
    pair.check("bert", steps=2)


def test_under_activation_checkpointing() -> None:
    """A graph replays by itself: the same masks, and nothing is counted twice."""
    pair = Pair(checkpointed(build("llama")), CONFIGS["element"])
    pair.check("llama")
    assert pair.counter.frame_count == 1


def test_with_breaks_it_is_slower_but_right() -> None:
    def broken(model: nn.Module) -> nn.Module:
        model.bert.encoder.layer[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
        model.compile(backend="aot_eager")
        return model

    torch._dynamo.utils.counters.clear()
    Pair(checkpointed(build("bert")), CONFIGS["minus"], broken).check("bert", steps=2)
    assert torch._dynamo.utils.counters["graph_break"]


def test_packed_rows() -> None:
    pair = Pair(build("llama"), CONFIGS["element"])
    for step in range(2):
        row = families.batch("llama", rows=1, length=8, seed=step)["input_ids"]
        ids, places = torch.tensor([[7] * 4 + [8] * 4]) + step, torch.arange(4).repeat(2)[None]
        batch = {"input_ids": row, "labels": row, "position_ids": places, "use_cache": False}
        expected, got = pair.losses(step, batch, ids, positions=places)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert pair.counter.frame_count == 1


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"use_cache": False}),
        ("llama", {"position_ids": torch.arange(4).repeat(2)[None]}),
        ("opt", {"position_ids": torch.arange(4).repeat(2)[None], "use_cache": False}),
        ("bert", {"position_ids": torch.arange(4).repeat(2)[None], "use_cache": False}),
        ("llama", {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}),
    ],
)
def test_packed_rows_that_might_see_each_other(family: str, more: dict[str, Any]) -> None:
    model, row = build(family), families.batch(family, rows=1, length=8)["input_ids"]
    if family == "bert":  # a decoder, whose mask knows nothing of positions
        model.config.is_decoder = True
        model = transformers.BertLMHeadModel(model.config).train()
    handle = hk.attach(model, CONFIGS["element"], stock_dropout="off")
    model.compile(backend="eager")
    with (
        handle.step(0, torch.tensor([[7] * 4 + [8] * 4])),
        pytest.raises(hk.DataError, match="documents of packed rows"),
    ):
        handle.loss(input_ids=row, labels=row, **more)


def test_automatic_precision() -> None:
    pair = Pair(build("bert"), CONFIGS["minus"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair.check("bert")
    assert pair.counter.frame_count == 1


def test_evaluation_is_the_stock_model() -> None:
    model, batch = build("llama"), families.batch("llama")
    stock = copy.deepcopy(model)
    handle = hk.attach(model, CONFIGS["hiddenkey"], stock_dropout="off")
    stock.eval()
    expected = stock(**batch)
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():  # in training mode, as for a metric; the stock dropout is off
        assert torch.equal(model(**batch).logits, expected.logits)
    with handle.step(0, IDS):
        handle.loss(**batch)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected.logits)
    model.eval()
    assert torch.equal(model(**batch).loss, expected.loss)
    assert model.config._attn_implementation == "hiddenkey"
    handle.detach()
    model.train()
    assert torch.equal(model(**batch).logits, expected.logits)  # this family has no dropout of its own


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_direct_call_says_what_to_call(fullgraph: bool) -> None:
    model, batch = build("bert"), families.batch("bert")
    handle = hk.attach(model, CONFIGS["minus"], stock_dropout="off")
    model.compile(fullgraph=fullgraph, backend="eager")
    # Where one graph is asked for, torch words the error and quotes ours.
    kind = torch._dynamo.exc.Unsupported if fullgraph else hk.StateError
    with handle.step(0, IDS), pytest.raises(kind, match="a compiled model cannot lay out its masks by itself"):
        model(**batch)
    with pytest.raises(kind, match="a training forward pass ran outside a step"):
        model(**batch)
    handle.record_masks(print)
    with handle.step(0, IDS), pytest.raises(hk.StateError, match="a compiled model does not show its masks"):
        handle.loss(**batch)
    handle.record_masks(None)
    with handle.step(0, IDS):
        handle.loss(**batch)


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda model: model.compile(),
        lambda model: model.bert.encoder.layer[1].compile(),
        lambda model: setattr(model, "bert", torch.compile(model.bert)),
    ],
)
def test_attaching_to_a_compiled_model_is_refused(compile_it: Callable[[nn.Module], None]) -> None:
    model = build("bert")
    compile_it(model)
    with pytest.raises(hk.UnsupportedModelError, match="attach first, then compile"):
        hk.attach(model, CONFIGS["minus"])


def test_sites_that_are_never_called_are_found_out() -> None:
    model = build("bert")
    handle = hk.attach(model, CONFIGS["minus"], stock_dropout="off")
    model.bert.encoder.layer[1].output.forward = lambda hidden, residual: (
        hidden @ model.bert.encoder.layer[1].output.dense.weight.T + residual
    )
    model.compile(fullgraph=True, backend="eager")
    with handle.step(0, IDS), pytest.raises(hk.UnsupportedModelError, match=r"1 site\(s\) were never called"):
        handle.loss(**families.batch("bert"))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    pair = Pair(build("roberta"), CONFIGS["minus"], backend="inductor")
    # Fused float32 arithmetic sums in another order: some units in the last place of numbers around 1.
    pair.check("roberta", steps=2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_element_pairs_is_a_torch_operator(side: str) -> None:
    from hiddenkey_rs.attachment.tokens import from_rows

    real = families.batch("bert", side=side)["attention_mask"].bool()
    tokens = from_rows(IDS, real, (0,))
    key = hk.MaskKey(seed=9, step=2, layer=1)
    extent = torch.tensor([tokens.columns, tokens.columns, tokens.aligned])
    places = (tokens.document, tokens.position, tokens.position)
    arguments = (torch.tensor([key.words]), tokens.sample_ids, extent, *places, 19661, 2)
    torch.library.opcheck(ops.element_pairs, arguments)
    keep = ops.element_pairs(*arguments)
    drawn = hk.masks.element_bool(key, IDS, 9, 9, 0.3, heads=2)
    for row, length in enumerate((9, 7, 5)):
        own = real[row].nonzero().flatten()
        assert np.array_equal(keep[row][:, own][:, :, own].numpy(), drawn[row][:, :length, :length])
