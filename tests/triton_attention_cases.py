"""Cases of ``test_triton_attention.py``: attention kernels against the reference, in Triton's interpreter.

Everything is compared through masks of (query, key) pairs that are built here from the definition: each document's own
mask, drawn by ``ops/generator.py`` in its own coordinates, laid over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hiddenkey_rs import ConfigError, MaskKey, masks, ops
from hiddenkey_rs.ops import triton_attention, triton_gather
from hiddenkey_rs.ops.documents import Documents

KEY = MaskKey(seed=11, step=3, layer=4)
SAMPLES = [5 + (1 << 33), 7, 0, 12345]

# Both sides sum in float32, in another order and (kernels) in base 2: a few units in the last place of numbers around 1.
CLOSE = {"rtol": 3e-5, "atol": 1e-5}


@dataclass
class Batch:
    """Where documents stand: document and position of every token, -1 at padding."""

    document: Tensor
    position: Tensor

    @property
    def real(self) -> Tensor:
        return self.document >= 0

    def to(self, device: str) -> Batch:
        return Batch(self.document.to(device), self.position.to(device))

    def documents(self) -> Documents:
        many = int(self.document.max()) + 1
        return Documents.of_tokens(SAMPLES[:many], self.document.clamp(min=0), self.position.clamp(min=0), self.real)


def batch(*rows: list[tuple[int, int, int]], width: int) -> Batch:
    """Each row a list of (start, length, first position); documents are numbered as they come."""
    document = torch.full((len(rows), width), -1)
    position = torch.full((len(rows), width), -1)
    number = 0
    for row, runs in enumerate(rows):
        for start, length, first in runs:
            document[row, start : start + length] = number
            position[row, start : start + length] = first + torch.arange(length)
            number += 1
    return Batch(document, position)


BATCHES = {
    "one token": batch([(0, 1, 0)], width=1),
    "three tokens": batch([(0, 3, 0)], width=3),
    "right padding": batch([(0, 127, 0)], [(0, 3, 0)], width=129),
    "left padding": batch([(2, 127, 0)], [(128, 1, 0)], width=129),
    "packed": batch([(1, 3, 0), (4, 70, 0), (75, 54, 0)], width=130),
    "split": batch([(0, 40, 120), (41, 20, 3)], [(0, 9, 250)], width=64),
    "tiny split": batch([(1, 9, 123)], width=10),
}


def tensors(heads: int, groups: int, queries: int, keys: int, rows: int, size=16, value_size=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + 7 * keys)
    shapes = [(rows, heads, queries, size), (rows, groups, keys, size), (rows, groups, keys, value_size or size)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def drawn(pattern: str, threshold: int, heads: int, queries: Batch, keys: Batch, key=KEY) -> Tensor:
    """Each document's mask in its own coordinates, bool (documents, heads, rows or 1, columns)."""
    rows, columns = int(queries.position.max()) + 1, int(keys.position.max()) + 1
    samples = torch.tensor(SAMPLES[: int(queries.document.max()) + 1], device=queries.document.device)
    if pattern == "element":
        return ops.element_keep(key.derive(), samples, rows, columns, threshold, heads)
    if pattern == "column":
        return ops.column_keep(key.derive(), samples, columns, threshold, heads)
    lengths = torch.tensor([int(keys.position[keys.document == n].max()) + 1 for n in range(len(samples))]).to(samples)
    return ops.span_keep(key.derive(), samples, lengths, columns, threshold, heads)


def pairs(keep: Tensor, queries: Batch, keys: Batch, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """(allowed, keep) over the batch, bool (B, heads or 1, Q, K)."""
    q, k = queries.position[:, :, None], keys.position[:, None, :]
    allowed = (queries.document[:, :, None] == keys.document[:, None, :]) & queries.real[:, :, None]
    if causal:
        allowed &= k <= q
    if window is not None:
        allowed &= (k > q - window) & ((k < q + window) | torch.tensor(causal))
    document = queries.document.clamp(min=0)[:, :, None]
    row = q.clamp(min=0) if keep.shape[2] > 1 else torch.zeros_like(q)
    laid = keep[document, :, row, k.clamp(min=0)]  # (B, Q, K, heads)
    return allowed[:, None], laid.permute(0, 3, 1, 2)


def compare(
    queries: Batch, keys: Batch | None = None, *, pattern="element", threshold=32768, position="dropkey", heads="group",
    causal=False, window=None, many=(4, 2), size=16, value_size=None, dtype=torch.float32, close=CLOSE, device="cpu",
) -> None:  # fmt: skip
    """Output, gradients and the count of kept pairs, kernel against reference. ``"column, kept"``: kept keys alone."""
    pattern, _, alone = pattern.partition(", ")
    queries, keys = queries.to(device), keys and keys.to(device)
    cross, keys = keys is not None, keys or queries
    documents = Documents.across(queries.documents(), keys.documents()) if cross else queries.documents()
    (b, lq), lk = queries.document.shape, keys.document.shape[1]
    inputs = [x.detach().to(device).requires_grad_() for x in tensors(*many, lq, lk, b, size, value_size, dtype)]
    mask_heads = many[1] if heads == "group" else many[0]
    keep = drawn(pattern, threshold, mask_heads, queries, keys)
    site = torch.tensor([KEY.derive()], device=device)
    given = {"keys": site, "threshold": threshold} if pattern == "element" else {"keep": keep[:, :, 0]}
    how = {"position": position, "heads": heads, "causal": causal, "window": window, "gather": alone == "kept"}
    out, kept_pairs = triton_attention.attention(*inputs, documents, **given, **how, count=True)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grads = torch.autograd.grad(out, inputs, gradient)

    allowed, laid = pairs(keep, queries, keys, causal, window)
    laid = laid.repeat_interleave(many[0] // mask_heads, dim=1)
    kept = ops.kept_set(allowed, laid, rescue="all" if cross else "own", queries=lq, keys=lk)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = ops.attention(*exact, allowed=allowed, kept=kept, position=position, impl="reference")
    wanted = torch.autograd.grad(expected, exact, gradient.float())
    assert out.dtype == dtype
    assert int(kept_pairs) == int(kept.sum())
    assert not out.transpose(1, 2)[~queries.real].any()
    for ours, theirs in zip((out, *grads), (expected, *wanted), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.float(), theirs, **close)


@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
@pytest.mark.parametrize("pattern", ["element", "column"])  # spans come as columns do: by flags
@pytest.mark.parametrize("name", ["left padding", "packed"])
def test_positions_and_patterns(name: str, pattern: str, position: str) -> None:
    compare(BATCHES[name], pattern=pattern, position=position, causal=name == "packed", threshold=6554, many=(2, 1))


# Where a case is about which pairs are seen, DropAttention draws elements: its kernels do all that DropKey's do, and more.
# Kept keys alone are kernels of their own, which only DropKey has.
KINDS = [("element", "dropattention"), ("column, kept", "dropkey")]


SPANS = ("span, kept", "dropkey")


@pytest.mark.parametrize(
    ("name", "pattern", "position"),
    [*((name, *kind) for name in BATCHES for kind in KINDS), ("packed", *SPANS), ("split", *SPANS)],
)
def test_batches(name: str, pattern: str, position: str) -> None:
    compare(BATCHES[name], pattern=pattern, position=position, causal=name != "right padding", many=(2, 1))


@pytest.mark.parametrize("threshold", [0, 65535])
@pytest.mark.parametrize(("pattern", "position"), [*KINDS, ("element", "dropkey")])
def test_extreme_rates(pattern: str, position: str, threshold: int) -> None:
    how = {"pattern": pattern, "position": position, "threshold": threshold, "many": (1, 1)}
    compare(BATCHES["split"], **how)
    compare(BATCHES["split"], BATCHES["split"], **how)


@pytest.mark.parametrize(("pattern", "position"), KINDS)
@pytest.mark.parametrize(("window", "causal"), [(1, False), (3, True), (3, False), (130, True)])
def test_windows(window: int, causal: bool, pattern: str, position: str) -> None:
    seen = {"window": window, "causal": causal}
    compare(batch([(0, 140, 0)], [(3, 20, 120)], width=140), pattern=pattern, position=position, many=(1, 1), **seen)


@pytest.mark.parametrize(("pattern", "position"), KINDS)
def test_the_last_key_of_a_tile(pattern: str, position: str) -> None:
    # With (next to) nothing dropped, a window of 2 lets the first query of the second block see key 63 of the first tile.
    compare(batch([(0, 65, 0)], width=65), pattern=pattern, position=position, threshold=1, causal=True, window=2)


@pytest.mark.parametrize(("pattern", "position"), [*KINDS, ("column", "dropattention")])
@pytest.mark.parametrize(("many", "heads"), [((4, 2), "group"), ((4, 2), "query"), ((4, 1), "group")])
def test_grouped_heads(heads: str, many: tuple[int, int], pattern: str, position: str) -> None:
    compare(BATCHES["tiny split"], heads=heads, many=many, pattern=pattern, position=position)


@pytest.mark.parametrize(("pattern", "position"), [*KINDS, ("span", "dropattention")])
@pytest.mark.parametrize("heads", ["group", "query"])
def test_cross_attention(heads: str, pattern: str, position: str) -> None:
    decoder, encoder = batch([(0, 3, 0)], [(1, 9, 0)], width=10), batch([(0, 129, 0)], [(5, 2, 0)], width=130)
    compare(decoder, encoder, pattern=pattern, position=position, heads=heads, many=(2, 1))


@pytest.mark.parametrize(("pattern", "position"), KINDS)
@pytest.mark.parametrize("size", [(1, 1), (24, 24), (17, 40), (80, 16), (65, 128)])
def test_head_sizes(size: tuple[int, int], pattern: str, position: str) -> None:
    how = {"size": size[0], "value_size": size[1], "pattern": pattern, "position": position, "causal": True}
    compare(BATCHES["three tokens"], **how)


@pytest.mark.parametrize(("pattern", "position"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, pattern: str, position: str) -> None:
    # Weights, logit gradients and results are each rounded to the dtype once; the reference here stays in float32. The
    # interpreter cuts bfloat16 off where a GPU rounds, which doubles the step.
    step = torch.finfo(dtype).eps
    close = {"rtol": 4 * step, "atol": 8 * step}
    compare(BATCHES["split"], dtype=dtype, pattern=pattern, position=position, close=close)


@pytest.mark.parametrize("gather", [False, True])
def test_a_head_whose_keys_are_all_dropped(gather: bool) -> None:
    # The definition of the rescue, in the open: each query its own value, or plain attention over all keys.
    one = batch([(0, 5, 0)], width=6)
    q, k, v = tensors(1, 1, 6, 6, 1)
    nothing = torch.zeros(1, 1, 5, dtype=torch.bool)
    out, _ = triton_attention.attention(q, k, v, one.documents(), keep=nothing, gather=gather)
    assert torch.equal(out[:, :, :5], v[:, :, :5])
    sides = Documents.across(one.documents(), one.documents())
    out, _ = triton_attention.attention(q, k, v, sides, keep=nothing, gather=gather)
    plain, _ = triton_attention.attention(q, k, v, sides)
    torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("heads", ["group", "query"])
@pytest.mark.parametrize("causal", [False, True])
def test_dropped_keys_are_never_read(causal: bool, heads: str) -> None:
    # Whatever stands in a dropped row stays there: a product with it, were it with a weight of zero, would be NaN.
    many = 2 if heads == "query" else 1
    keep = masks.column(KEY, [SAMPLES[0]], 150, 0.3, heads=many).to_torch()[:, :, 0]
    keep[:, :, 0] = True  # so that no causal row has to be rescued
    keep[:, 1:] = keep[:, :1]  # and where heads have masks of their own, no key is dropped by one alone
    inputs = tensors(2, 1, 151, 151, 1)
    documents = batch([(1, 150, 0)], width=151).documents()
    gone = torch.cat((torch.tensor([True]), ~keep[0, 0]))
    spoilt = [x.detach().clone() for x in inputs]
    for rows in spoilt[1:]:
        rows[:, :, gone] = torch.nan
    how = {"keep": keep, "causal": causal, "heads": heads}
    expected, _ = triton_attention.attention(*inputs, documents, **how, gather=False)
    spoilt = [x.requires_grad_() for x in spoilt]
    out, _ = triton_attention.attention(*spoilt, documents, **how, gather=True)
    torch.testing.assert_close(out, expected, **CLOSE)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), spoilt), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_lists_are_the_cores_bits() -> None:
    # Heads of an example that starts at position 3, of one without keys, and of one that lost all of them.
    keep = masks.column(KEY, SAMPLES[:3], 1100, 0.3, heads=2).to_torch()[:, :, 0]
    keep[2] = False
    table = torch.zeros(3, 8, dtype=torch.int64)
    table[:, 4], table[:, 7] = torch.tensor([1090, 0, 1100]), torch.tensor([3, 0, 0])
    for cross in (False, True):
        lists = triton_gather.kept_lists(table, keep, cross)
        for head in range(2):
            ranks, kept = lists[0, head]
            expected = keep[0, head, 3:1093].nonzero()[:, 0] + 3
            assert torch.equal(kept[: len(expected)].long(), expected)
            assert torch.equal(ranks[4:1094].long(), keep[0, head, 3:1093].cumsum(0))
            assert int(ranks[3]) == int(lists[1, head, 0, 0]) == 0
            assert int(lists[2, head, 0, 1100]) == (1100 if cross else 0)
        if cross:
            assert torch.equal(lists[2, 0, :, :1100], torch.arange(1100).int().expand(2, -1))


def test_who_visits_kept_keys_alone() -> None:
    # By itself from 48 dropped keys on, a window counts what it shows; and what was asked for never falls back.
    worth = triton_gather.worth_gathering
    assert [worth(keys, 0.1) for keys in (479, 481)] == [worth(keys, None) for keys in (479, 481)] == [False, True]
    assert [worth(8192, 0.3, True, width) for width in (159, 161)] == [False, True]
    assert [worth(8192, 0.3, False, width) for width in (80, 81)] == [False, True]
    q, k, v = GOOD.values()
    keep = torch.ones(1, 1, 6).bool()
    sides = Documents.across(DOCUMENTS, DOCUMENTS)
    refused = {
        "no keep is given": {"documents": DOCUMENTS, "keys": KEYS, "threshold": 5},
        "passes through dropped keys": {"documents": DOCUMENTS, "keep": keep, "position": "dropattention"},
        "see different keys": {"documents": sides, "keep": keep, "causal": True},
    }
    for message, how in refused.items():
        with pytest.raises(ConfigError, match=message):
            triton_attention.attention(q, k, v, **how, gather=True)


def test_small_kept_weights_are_not_lost() -> None:
    # The dropped key outweighs the kept ones by more than float32 can hold: the kept ones are what is left all the same.
    q = torch.tensor([[[[1.0] * 4]]]).expand(1, 1, 3, 4)
    k = torch.tensor([[[[200.0] * 4, [0.0] * 4, [0.1] * 4]]])
    v = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    # float32 holds a logit of 400 to 3e-5, and weights are its exponentials
    close = {"rtol": 3e-4, "atol": 1e-4}
    keep = torch.tensor([[[False, True, True]]])
    documents = batch([(0, 3, 0)], width=3).documents()
    for position in ("dropkey", "dropattention"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = triton_attention.attention(*inputs, documents, keep=keep, position=position)
        kept = keep[:, :, None].expand(1, 1, 3, 3)
        theirs = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = ops.attention(*theirs, allowed=None, kept=kept, position=position, impl="reference")
        torch.testing.assert_close(out, expected, **close)
        wanted = torch.autograd.grad(expected.square().sum(), theirs)
        for ours, reference in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(ours, reference, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # whose tiles have 64 and 128 columns
def test_masks_are_the_cores_bits(dtype: torch.dtype) -> None:
    # With equal logits and the identity for values, 64 columns at a time, the output is the kept set itself over its size.
    length, rate, size = 150, 0.3, 64
    q = k = torch.zeros(1, 2, length, 16, dtype=dtype)
    expected = masks.element(KEY, [SAMPLES[0]], length, length, rate, heads=2).to_torch()
    documents = batch([(0, length, 0)], width=length).documents()
    found = []
    for start in range(0, length, size):
        v = torch.zeros(1, 2, length, size, dtype=dtype)
        columns = torch.arange(start, min(start + size, length))
        v[:, :, columns, columns - start] = 1.0
        keys = torch.tensor([KEY.derive()])
        out, _ = triton_attention.attention(q, k, v, documents, keys=keys, threshold=masks.threshold(rate))
        found.append(out > 0)
    assert torch.equal(torch.cat(found, dim=-1)[..., :length], expected)


def test_branches_draw_under_keys_of_their_own() -> None:
    q, k, v = tensors(2, 2, 9, 9, 1)
    other = MaskKey(seed=11, step=3, layer=4, branch=1)
    keys = torch.tensor([KEY.derive(), other.derive()])
    one = batch([(0, 9, 0)], width=9).documents()
    table = torch.cat((one.table, one.table))
    table[1, 0] = 1
    both = Documents(table, 9, 9, 9)
    out, _ = triton_attention.attention(*(torch.cat((x, x)) for x in (q, k, v)), both, keys=keys, threshold=32768)
    for row in range(2):
        alone, _ = triton_attention.attention(q, k, v, one, keys=keys[row : row + 1], threshold=32768)
        assert torch.equal(out[row], alone[0])
    assert not torch.equal(out[0], out[1])


def test_layouts_and_expanded_gradients() -> None:
    # Heads inside, as models lay them out, a slice of a fused projection, and the gradient of a sum (stride 0).
    fused = torch.randn(1, 5, 3, 2, 16)
    q, k, v = (fused[:, :, n].transpose(1, 2).requires_grad_() for n in range(3))
    documents = batch([(0, 5, 0)], width=5).documents()
    how = {"keys": torch.tensor([KEY.derive()]), "threshold": 32768}
    out, _ = triton_attention.attention(q, k, v, documents, **how)
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    same, _ = triton_attention.attention(*plain, documents, **how)
    assert torch.equal(out, same)
    assert out.transpose(1, 2).is_contiguous()
    ones = torch.autograd.grad(same, plain, torch.ones_like(same))
    for ours, theirs in zip(torch.autograd.grad(out.sum(), (q, k, v)), ones, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gather", [False, True])
def test_tensors_that_come_back_in_another_layout(gather: bool) -> None:
    # As from torch.autograd.graph.save_on_cpu(pin_memory=True), which keeps no strides.
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors(2, 1, 6, 6, 2)]
    documents = batch([(0, 6, 0)], [(1, 5, 0)], width=6).documents()
    keep = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    found = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = triton_attention.attention(*inputs, documents, keep=keep, gather=gather)
        found.append(torch.autograd.grad(out.square().sum(), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_as_a_torch_operator() -> None:
    q, k, v = tensors(2, 1, 6, 6, 1)
    table = batch([(0, 5, 0)], width=6).documents().table
    keys = torch.tensor([KEY.derive()])
    settings = (5, 5, False, 32768, 1, 0.25, True, True, 0, False, False, False, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(triton_attention.attention_forward, (q, k, v, table, keys, None, *settings), test_utils=tests)


def test_rows_that_begin_at_their_start_are_known_without_asking() -> None:
    found = batch([(0, 5, 0)], [(0, 9, 0)], width=9).documents()
    known = Documents.of_rows(found.table[:, 5], [5, 9], 9)
    assert torch.equal(found.table, known.table)
    facts = [(each.queries, each.keys, each.positions, each.shifted, each.full) for each in (found, known)]
    assert facts[0] == facts[1] == (9, 9, 9, False, False)
    assert Documents.of_rows([4, 5], [3, 0], 3).table[1, 2] == 0
    assert Documents.of_rows([4, 5], [3, 3], 3).full


def test_nothing_to_do() -> None:
    q, k, v = tensors(2, 1, 4, 4, 1)
    empty = Documents.of_tokens([], torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), torch.zeros(1, 4).bool())
    out, kept = triton_attention.attention(q, k, v, empty, count=True)
    assert not out.any()
    assert int(kept) == 0
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


DOCUMENTS = batch([(0, 6, 0)], width=6).documents()
KEYS = torch.tensor([KEY.derive()])
GOOD = {"query": torch.ones(1, 2, 6, 16), "key": torch.ones(1, 1, 6, 16), "value": torch.ones(1, 1, 6, 16)}
REFUSED = {
    "float16, bfloat16 and float32, not torch.float64": {"query": torch.ones(1, 2, 6, 16).double()},
    "float32 are at most 128 wide here, not 300": {"query": torch.ones(1, 2, 6, 300), "key": torch.ones(1, 1, 6, 300)},
    "queries, keys and values disagree": {"key": torch.ones(1, 1, 5, 16)},
    "multiple of key/value heads": {
        "query": torch.ones(1, 3, 6, 16),
        **{n: torch.ones(1, 2, 6, 16) for n in ("key", "value")},
    },
    "must have one dtype": {"value": torch.ones(1, 1, 6, 16).half()},
    "have no features": {"value": torch.ones(1, 1, 6, 0)},
    r"int64 of shape \(documents, 8\)": {"documents": Documents(torch.ones(2, 7).long(), 1, 1, 1)},
    "longer than the batch": {"documents": Documents(DOCUMENTS.table, 7, 6, 6)},
    "as many queries as keys": {"query": torch.ones(1, 2, 7, 16)},
    "got both": {"keys": KEYS, "keep": torch.ones(1, 1, 6).bool()},
    "site keys are int64": {"keys": KEYS[0]},
    r"threshold must lie in 0\.\.65535 \(got 65536\)": {"keys": KEYS, "threshold": 65536},
    "keep is bool": {"keep": torch.ones(1, 1, 5).bool()},
    "another number of heads": {"keep": torch.ones(1, 2, 6).bool()},
    r"window must be at least 1, the own key \(got 0\)": {"window": 0},
    "attention position": {"position": "dropvalue"},
    "heads": {"heads": "row"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_disagrees_is_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        triton_attention.attention(**{"documents": DOCUMENTS, **GOOD, **REFUSED[message]})


def test_obstacles() -> None:
    q, k, v = GOOD.values()
    assert triton_attention.obstacle(q, k, v) is None
    assert "additive bias" in triton_attention.obstacle(q, k, v, bias=q)
    assert "soft-capping" in triton_attention.obstacle(q, k, v, softcap=30.0)
    assert "sinks" in triton_attention.obstacle(q, k, v, sinks=q)
    assert "dropout" in triton_attention.obstacle(q, k, v, dropout=0.1)


def test_documents_with_gaps_are_refused() -> None:
    real = torch.tensor([[True, False, True]])
    with pytest.raises(ConfigError, match="side by side"):
        Documents.of_tokens([1], torch.zeros(1, 3).long(), torch.tensor([[0, 0, 1]]), real)
    with pytest.raises(ConfigError, match="side by side"):
        Documents.of_tokens([1], torch.zeros(1, 3).long(), torch.tensor([[0, 1, 3]]), torch.ones(1, 3).bool())
    with pytest.raises(ConfigError, match="do not pair up"):
        Documents.across(BATCHES["packed"].documents(), BATCHES["split"].documents())


@pytest.mark.parametrize(("pattern", "position"), KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_full_batch_is_written_whole(causal: bool, pattern: str, position: str) -> None:
    """Nothing of a batch without padding is set to zero first: what is not written would show as NaN here."""
    whole, two = batch([(0, 21, 0)], [(0, 21, 0)], width=21), batch([(0, 9, 0), (9, 12, 0)], width=21)
    assert whole.documents().full
    assert two.documents().full
    assert not BATCHES["left padding"].documents().full
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        for given in (whole, two):
            compare(given, pattern=pattern, position=position, causal=causal)
        if not causal:
            compare(whole, whole, pattern=pattern, position=position)
    finally:
        torch.use_deterministic_algorithms(False)
