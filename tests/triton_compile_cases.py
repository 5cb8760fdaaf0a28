"""Compiled models on the Triton kernels, in the interpreter: equal to eager ones. Run by tests/test_triton_attach.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import families
import hiddenkey_rs as hk

SMALL = {
    "bert": {"num_hidden_layers": 1},
    "mistral": {"num_hidden_layers": 2},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}


@pytest.mark.parametrize("family", SMALL)
def test_a_compiled_model_equals_the_eager_one(family: str) -> None:
    config = hk.HiddenKeyConfig.preset("hiddenkey" if family == "bert" else "hiddenkey-minus", rate=0.4)
    torch._dynamo.reset()
    model = families.build(family, **SMALL[family])
    model.config.problem_type = "single_label_classification" if family == "bert" else None
    twin = copy.deepcopy(model)
    eager, handle = (hk.attach(each, config, stock_dropout="off", impl="triton") for each in (twin, model))
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=counter)
    rows = 2 if family == "mistral" else 1  # the second one is padded
    passes = 1 if config.consistency is None else 2
    for step, length in enumerate((9, 8)):
        batch = families.batch(family, rows=rows, side="left" if step else "right", seed=step)
        batch = {name: part[:, :length] if part.dim() == 2 else part for name, part in batch.items()}
        found = []
        for each in (eager, handle):
            each.model.zero_grad()
            with each.step(step, [1 << 35, 7][:rows]):
                loss = each.loss(**batch)
            loss.backward()
            gradients = {name: p.grad for name, p in each.model.named_parameters() if p.grad is not None}
            found.append({"loss": loss.detach(), **gradients})
        torch.testing.assert_close(found[1], found[0])
        assert counter.frame_count == (1 + step) * passes  # the second one is of any length
    assert handle.realised() == eager.realised() != {}


def test_a_decoder_that_is_given_tokens_alone() -> None:
    torch._dynamo.reset()
    model = families.build("llama", num_hidden_layers=2)
    twin = copy.deepcopy(model)
    eager, handle = (hk.attach(each, "hiddenkey-minus", stock_dropout="off", impl="triton") for each in (twin, model))
    model.compile(fullgraph=True, backend="aot_eager")
    ids = families.batch("llama", rows=1, length=5)["input_ids"]
    losses = []
    for each in (eager, handle):
        with each.step(2, [7]):
            losses.append(each.loss(input_ids=ids, labels=ids))
    torch.testing.assert_close(losses[1], losses[0])


def test_rows_that_hold_a_documents_later_part_are_refused() -> None:
    torch._dynamo.reset()
    model = families.build("llama", num_hidden_layers=2)
    handle = hk.attach(model, "hiddenkey-minus", stock_dropout="off", impl="triton")
    model.compile(backend="aot_eager")
    ids, mask = torch.randint(5, 40, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    places = torch.arange(6) + torch.tensor([[40], [0]])
    refused = pytest.raises(hk.ConfigError, match=r"no later parts of documents .*impl='triton'")
    with handle.step(0, [[3] * 6, [4] * 6], positions=places), refused:
        handle.loss(input_ids=ids, labels=ids, attention_mask=mask)


def test_packed_rows_are_refused_where_the_kernels_were_asked_for() -> None:
    torch._dynamo.reset()
    model = families.build("llama", num_hidden_layers=2)
    handle = hk.attach(model, "hiddenkey-minus", stock_dropout="off", impl="triton")
    model.compile(backend="aot_eager")
    ids = torch.randint(5, 40, (1, 6))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    with handle.step(0, [[3, 3, 3, 4, 4, 4]]), pytest.raises(hk.ConfigError, match=r"no packed rows .*impl='triton'"):
        handle.loss(**batch)
