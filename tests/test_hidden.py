"""Dropout on hidden states, and the attention-guided span."""

from __future__ import annotations

import pytest
import torch

import families
import hiddenkey_rs as hk
from hiddenkey_rs import masks, ops
from hiddenkey_rs.config import threshold


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rescale", [None, True, False])
@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_what_is_kept_is_rescaled_by_the_realised_rate(pattern: str, rescale: bool | None, impl: str) -> None:
    """E[mask * scale] = 1: by 1 / (1 - 19661 / 65536) at rate .3; elements unless told otherwise, others if told."""
    model = families.build("bert").train()
    drop = hk.HiddenDrop(pattern=pattern, rate=0.3, rescale=rescale)
    handle = hk.attach(model, hk.HiddenKeyConfig(attention=None, hidden=drop, consistency=None), "off", impl)
    site = next(site for site in handle.sites if site.kind == "ffn" and site.drops)
    seen = []

    def inputs(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(torch.nn.functional.linear(args[0], module.weight, module.bias))

    site.module.register_forward_pre_hook(inputs)
    site.module.register_forward_hook(lambda module, args, output: seen.append(output))
    with handle.step(0, [5, 6, 7]):
        handle.loss(**families.batch("bert"))
    before, after = seen
    kept = after != 0
    assert 0 < int(kept.sum()) < kept.numel()
    scale = 65536 / (65536 - 19661) if (pattern == "element" if rescale is None else rescale) else 1.0
    torch.testing.assert_close(after[kept], before[kept] * scale)
    assert masks.realised(0.3) == 19661 / 65536


def test_dropped_places_are_gone() -> None:
    hidden = torch.tensor([[[1.0, float("inf"), float("nan"), -2.0]]], requires_grad=True)
    keep = torch.tensor([[[True, False, False, True]]])
    output = ops.drop_hidden(hidden, keep, 2.0)
    assert output.tolist() == [[[2.0, 0.0, 0.0, -4.0]]]
    output.sum().backward()
    assert hidden.grad.tolist() == [[[2.0, 0.0, 0.0, 2.0]]]
    token = ops.drop_hidden(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.tensor([[[True], [False]]]))
    assert token.dtype == torch.bfloat16
    assert token.tolist() == [[[1.0] * 3, [0.0] * 3]]


def test_guided_spans_start_at_much_attended_tokens_and_fit() -> None:
    length = 10
    received = torch.tensor([[0.1, 9.0, 0.2, 8.0, 0.3, 0.4, 7.0, 0.5, 0.6, 6.0, -1.0, -1.0]])
    real = torch.arange(12)[None] < length
    t = threshold(0.2)  # two tokens
    starts = set()
    for draw in range(0, 1 << 32, 1 << 28):
        keep = ops.guided_span(received, real, torch.tensor([length]), torch.tensor([draw]), t)
        dropped = (~keep & real)[0].nonzero().flatten().tolist()
        assert len(dropped) == 2
        assert dropped[1] == dropped[0] + 1
        assert not keep[0, length:].any()
        starts.add(dropped[0])
    # floor(.4 * 10) = 4 candidates: 1, 3, 6, and 9, which is moved back so that the block fits
    assert starts == {1, 3, 6, 8}


def test_guided_spans_with_left_padding() -> None:
    received = torch.tensor([[-1.0, -1.0, 5.0, 1.0, 1.0]])
    real = torch.tensor([[False, False, True, True, True]])
    keep = ops.guided_span(received, real, torch.tensor([3]), torch.tensor([0]), threshold(0.3))
    assert keep.tolist() == [[False, False, False, True, True]]
