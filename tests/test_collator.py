"""The collator's batches: the reference's arrays, the stock collators' tensors, in workers and in buffers, for ever."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import hiddenkey_rs as hk
from hiddenkey_rs import Collator, ConfigError, DataError, PlanSpec, TokenStore
from hiddenkey_rs.attachment import tokens as attached
from hiddenkey_rs.loading.buffers import Ring
from hiddenkey_rs.loading.packed import PackedStore
from hiddenkey_rs.loading.rows import RowBatch
from reference import pad as reference


class Rows(list):
    """As a sampler gives them."""

    epoch, step, micro = 1, 7, 0


def make_store(seed: int = 0, rows: int = 40, longest: int = 30, dtype=np.int32, **columns) -> TokenStore:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, longest + 1, rows))])
    return TokenStore((rng.integers(1, 1000, offsets[-1]).astype(dtype), offsets), **columns)


def full_store(**change) -> TokenStore:
    """A store with a label a token, token types and ids."""
    plain = make_store(**change)
    rng = np.random.default_rng(1)
    return TokenStore(
        (plain.values, plain.offsets),
        token_columns={
            "labels": rng.integers(-100, 1000, len(plain.values)),
            "token_type_ids": rng.integers(0, 2, len(plain.values)).astype(np.int32),
        },
        sample_ids=rng.permutation(2**39 + np.arange(len(plain))),
    )


def equal(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


# -- layouts ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(-1, 39), min_size=1, max_size=9),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 8]),
    max_length=st.sampled_from([None, 5]),
    labels=st.sampled_from(["auto", "column", "tokens", None]),
    layout=st.sampled_from(["padded", "flat"]),
    position_ids=st.booleans(),
)
def test_batches_are_the_reference(rows, side, multiple, max_length, labels, layout, position_ids) -> None:
    store, flat = full_store(), layout == "flat"
    side = "right" if flat else side
    collator = Collator(
        pad_token_id=9,
        padding_side=side,
        pad_to_multiple_of=multiple,
        max_length=max_length,
        labels=labels,
        layout=layout,
        position_ids=position_ids,
    )
    documents = [reference.document(store.offsets, row, max_length) for row in rows]
    grouped = [documents] if flat else [[document] for document in documents]
    width = reference.width_of(grouped, multiple or 1)
    expected = reference.lay(
        store.values,
        store.offsets,
        grouped,
        width,
        pad=9,
        left=side == "left",
        joined=flat,
        labels=None if labels == "tokens" else store.token_columns["labels"],
        types=store.token_columns["token_type_ids"],
        sample_ids=store.sample_ids,
    )
    batch = collator(store.__getitems__(rows))
    names = ["input_ids"] + ["attention_mask"] * (not flat) + ["labels"] * (labels is not None) + ["token_type_ids"]
    names += ["position_ids"] * (flat or position_ids) + ["sample_id"]
    places = {"sample_position"} & set(batch)
    if places:  # a row was taken twice, one copy behind the other
        assert flat
        real = batch["sample_id"] >= 0
        assert torch.equal(batch["sample_position"], batch["position_ids"].where(real, torch.tensor(-1)))
    assert bool(places) == (flat and any(a == b >= 0 for a, b in pairwise(rows)))
    assert list(batch)[: len(names)] == names
    if not flat:
        expected["sample_id"] = np.array([-1 if row < 0 else store.sample_ids[row] for row in rows])
    for name in names:
        assert batch[name].dtype == torch.int64
        assert np.array_equal(batch[name].numpy(), expected[name]), name
        assert batch[name].is_contiguous()
    if flat:
        ends = reference.boundaries(grouped, width)
        assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == ends
        assert batch["cu_seq_lens_q"].dtype == torch.int32
        assert batch["max_length_q"] == batch["max_length_k"] == max(np.diff(ends))
        assert len(batch) == len(names) + len(places) + 4
    else:
        assert len(batch) == len(names)


@pytest.mark.parametrize("too_long", ["refuse", "split"])
def test_packed_rows(too_long: str) -> None:
    store = full_store()
    packed = store.packed(64 if too_long == "refuse" else 13, too_long=too_long)
    assert isinstance(packed, PackedStore)
    capacity = packed.packing.capacity
    batch = Collator(layout="packed", pad_token_id=5, cu_seqlens=True)(packed.__getitems__([0, -1, len(packed) - 1]))
    names = ["input_ids", "labels", "token_type_ids", "position_ids", "sample_id"]
    names += ["sample_position"] if too_long == "split" else []
    assert list(batch) == [*names, "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"]
    assert {tuple(batch[name].shape) for name in names} == {(3, capacity)}
    assert (batch["input_ids"][1] == 5).all()
    assert (batch["labels"][1] == -100).all()
    assert (batch["sample_id"][1] == -1).all()
    assert batch["position_ids"][1].tolist() == list(range(capacity))
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all(), "no document's first token is predicted"
    assert starts.sum() == len(batch["cu_seq_lens_q"]) - 1
    assert starts.flatten().nonzero().flatten().tolist() == batch["cu_seq_lens_q"][:-1].tolist()
    for row, number in ((0, 0), (2, len(packed) - 1)):
        alone = packed[number]
        real = batch["sample_id"][row] >= 0
        assert real.sum() == len(alone["input_ids"])
        for name in ("input_ids", "position_ids", "sample_id"):
            assert batch[name][row][real].tolist() == alone[name].tolist()
    assert "cu_seq_lens_q" not in Collator(layout="packed")(packed.__getitems__([0]))


def test_a_packed_store_is_a_data_set() -> None:
    store = full_store()
    packed = store.packed(64)
    assert packed.lengths.tolist() == [64] * len(packed)
    assert packed.digest == store.packed(64).digest != store.packed(65).digest
    assert packed.digest != store.packed(64, too_long="split").digest
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again.packing.documents, packed.packing.documents)
    for number in range(len(packed)):
        row = packed[number]
        ids = row["sample_id"][row["position_ids"] == 0]
        assert ids.tolist() == store.sample_ids[packed.packing[number]].tolist()
        assert len(row["input_ids"]) == store.lengths[packed.packing[number]].sum()
    for number in (-1, len(packed)):
        with pytest.raises(IndexError, match=f"got {number}"):
            packed[number]
    assert repr(packed).startswith("PackedStore(Packing(")


@pytest.mark.parametrize(
    ("columns", "rows", "labels"),
    [
        ({"labels": np.array([3, 1, 2])}, [2, -1, 0], torch.tensor([2, -100, 3])),
        ({"label": np.array([3, 1, 2], np.int32)}, [2, 0], torch.tensor([2, 3])),
        ({"labels": np.array([0.5, 1.5, 2.5])}, [1, -1], torch.tensor([1.5, 0.0])),
        ({"label_ids": np.array([0.5, 1.5, 2.5], np.float32)}, [1], torch.tensor([1.5])),
    ],
)
def test_a_label_an_example(columns: dict, rows: list[int], labels: torch.Tensor) -> None:
    store = TokenStore((np.arange(6), np.array([0, 1, 4, 6])), row_columns=columns)
    for mode in ("auto", "column"):
        found = Collator(labels=mode)(store.__getitems__(rows))["labels"]
        assert found.dtype == labels.dtype
        assert torch.equal(found, labels)
    assert next(iter(store.row_columns.values())).tolist() == next(iter(columns.values())).tolist(), "never written to"
    assert Collator(labels="tokens")(store.__getitems__(rows))["labels"].ndim == 2
    assert "labels" not in Collator(labels=None)(store.__getitems__(rows))


def test_labels_of_tokens_come_before_an_examples() -> None:
    store = make_store()
    columns = {"labels": np.arange(len(store.values))}
    both = TokenStore((store.values, store.offsets), token_columns=columns, row_columns={"label": np.zeros(40)})
    for layout in ("padded", "flat"):
        assert Collator(layout=layout)(both.__getitems__([1]))["labels"].shape == (1, store.lengths[1])


def test_labels_of_themselves() -> None:
    store = make_store()
    assert "labels" not in Collator()(store.__getitems__([0]))
    flat = Collator(layout="flat")(store.__getitems__([0, 1]))
    assert torch.equal(flat["labels"][flat["position_ids"] > 0], flat["input_ids"][flat["position_ids"] > 0])


# -- others' batches --------------------------------------------------------------------------------------------------


def features(store: TokenStore, rows, **more) -> list[dict]:
    return [
        {"input_ids": store[row]["input_ids"].tolist(), **{k: f(store, row) for k, f in more.items()}} for row in rows
    ]


def tokenizer(side: str):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, **{str(number): number for number in range(1, 1000)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_padding_is_transformers(side: str, multiple: int | None) -> None:
    from transformers import DataCollatorWithPadding

    store = make_store()
    labelled = TokenStore((store.values, store.offsets), row_columns={"labels": np.arange(len(store))})
    stock = DataCollatorWithPadding(tokenizer(side), pad_to_multiple_of=multiple)
    ours = Collator(padding_side=side, pad_to_multiple_of=multiple)
    rows = [3, 0, 39, 17]
    theirs = stock(features(store, rows, labels=lambda _, row: row))
    batch = ours(labelled.__getitems__(rows))
    assert set(theirs) == {"input_ids", "attention_mask", "labels"}
    for name in theirs:
        assert torch.equal(batch[name], theirs[name]), name


def test_flattening_is_transformers() -> None:
    from transformers import DataCollatorWithFlattening

    store, rows = make_store(), [3, 0, 39, 17]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features(store, rows))
    ours = Collator(layout="flat")(store.__getitems__(rows))
    ids = ours.pop("sample_id")
    assert ids[0, ours["cu_seq_lens_q"][:-1].long()].tolist() == rows
    assert set(theirs) == set(ours)
    for name in ours:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("form", [list, np.asarray, torch.as_tensor])
def test_examples_become_the_same_batch(layout: str, form) -> None:
    store, rows = full_store(), [3, 0, 3, 39]
    collator = Collator(layout=layout, labels="auto")
    given_as = [
        {
            "input_ids": form(store[row]["input_ids"].tolist()),
            "attention_mask": form([1] * int(store.lengths[row])),
            "labels": form(store[row]["labels"].tolist()),
            "token_type_ids": form(store[row]["token_type_ids"].tolist()),
            "sample_id": store[row]["sample_id"],
            "text": "left out",
        }
        for row in rows
    ]
    equal(collator(given_as), collator(store.__getitems__(rows)))
    without = collator([{key: value for key, value in example.items() if key != "sample_id"} for example in given_as])
    assert "sample_id" not in without


def test_examples_with_a_label_each() -> None:
    store = make_store()
    for name, label, expected in (
        ("label", lambda _, row: row, torch.tensor([3, 0])),
        ("labels", lambda _, row: row / 2, torch.tensor([1.5, 0.0])),
        ("label_ids", lambda _, row: [row, 0.5], torch.tensor([[3.0, 0.5], [0.0, 0.5]])),
    ):
        batch = Collator()(features(store, [3, 0], **{name: label}))
        assert batch["labels"].dtype == expected.dtype
        assert torch.equal(batch["labels"], expected)
    assert Collator()([{"input_ids": [5], "label": 1}])["labels"].tolist() == [1], "a number is no list of one"
    assert Collator()([{"input_ids": [5], "label": [1]}])["labels"].tolist() == [[1]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], r"takes the rows of a store or a list of examples \(got no examples\)"),
        ({"input_ids": [1]}, r"list of examples \(got dict\)"),
        (7, r"list of examples \(got int\)"),
        ([{"ids": [1]}], r"no input_ids \(got keys ids\)"),
        ([[1, 2]], r"no input_ids \(got keys list\)"),
        ([{"input_ids": [1]}, {"label": 0}], r"no input_ids, others do \(got keys label in example 1\)"),
        ([{"input_ids": [1], "label": 0}, {"input_ids": [1]}], r"no label, others do .*example 1"),
        ([{"input_ids": ["a"]}], r"input_ids must be numbers \(got <U1 in example 0\)"),
        ([{"input_ids": [[1], [2, 3]]}], r"input_ids must be numbers \(got .*inhomogeneous.* in example 0\)"),
        ([{"input_ids": [[1, 2]]}], r"input_ids must be as long as the tokens \(got shape \(1, 2\)"),
        ([{"input_ids": [0.5]}], r"input_ids must be integers \(got float64 in example 0\)"),
        ([{"input_ids": [1, -2]}], r"row 0 holds a token id outside the vocabulary \(got -2 at position 1"),
        (
            [{"input_ids": [1, 2], "token_type_ids": [0]}],
            r"token_type_ids must be as long .*\(got shape \(1,\) for 2 in",
        ),
        (
            [{"input_ids": [1], "attention_mask": [1]}, {"input_ids": [0, 1], "attention_mask": [0, 1]}],
            r"the attention mask hides a token \(got 0 in example 1\); tokenise without padding",
        ),
        (
            [{"input_ids": [1], "labels": [1, 2]}, {"input_ids": [1], "labels": [1]}],
            r"labels of a batch must have one shape.*\(got shapes \[\(1,\), \(2,\)\]\)",
        ),
    ],
)
def test_wrong_examples(batch, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Collator()(batch)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_steps() -> None:
    """The documents, ids and lengths that an attached model finds in the batch, and so the same masks."""
    store = full_store()
    spec = PlanSpec("hiddenkey", layers=2, heads=3, steps_per_epoch=100)
    rows = Rows([3, -1, 39])
    padded = Collator(plan=spec, max_length=12, padding_side="left")(store.__getitems__(rows))
    plan = pickle.loads(pickle.dumps(padded["mask_plan"]))
    samples = np.where(padded["sample_id"] < 0, 0, padded["sample_id"])
    found = attached.from_rows(samples, padded["attention_mask"].bool().repeat(2, 1), (0, 1))
    packed = store.packed(40)
    joined = Collator(plan=spec, layout="packed")(packed.__getitems__(Rows([1, -1, 0])))
    flat = Collator(plan=spec, layout="flat", pad_to_multiple_of=64)(store.__getitems__(rows))
    pairs = [(plan, found)]
    for batch in (joined, flat):
        ids, positions = batch["sample_id"].numpy(), batch["position_ids"].numpy()
        pairs.append((batch["mask_plan"], attached.from_packed(ids, positions, (0, 1), torch.device("cpu"))))
    for plan, found in pairs:
        assert plan.samples.tolist() == found.samples.tolist()
        assert plan.lengths.tolist() == found.lengths.tolist()
        assert plan.branches.tolist() == found.branches.tolist()
        half = len(found.samples) // 2
        expected = hk.plan_step("hiddenkey", 107, found.samples[:half], found.lengths[:half], layers=2, heads=3)
        for site in ((0, "attention"), (1, "attention")):
            assert plan.mask(*site) == expected.mask(*site)
            assert np.array_equal(plan.kept(*site), expected.kept(*site))


def test_which_step_is_planned() -> None:
    store = make_store()
    spec = PlanSpec("dropkey-column", layers=1, heads=1)
    first = RowBatch(store, np.array([1]), epoch=0, step=5)
    mask = Collator(plan=spec)(first)["mask_plan"].mask(0, "attention")
    assert mask == hk.plan_step("dropkey-column", 5, [1], [store.lengths[1]], layers=1, heads=1).mask(0, "attention")
    with pytest.raises(ConfigError, match=r"a batch does not know its step .*BatchSampler"):
        Collator(plan=spec)(store.__getitems__([0]))
    with pytest.raises(ConfigError, match=r"steps_per_epoch is missing \(got a batch of epoch 1\)"):
        Collator(plan=spec)(store.__getitems__(Rows([0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "hiddenky"}, "did you mean 'hiddenkey'"),
        ({"layers": -1}, "layers must be .*got -1"),
        ({"heads": 2000}, "heads must be .*got 2000"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be .*got 0"),
    ],
)
def test_wrong_plans(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanSpec(**{"config": "hiddenkey", "layers": 2, "heads": 2, **change})


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": -1}, "pad_token_id must be .*got -1"),
        ({"padding_side": "middle"}, r"unknown padding_side \(got 'middle'\)"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be .*got 0"),
        ({"max_length": 0}, "max_length must be .*got 0"),
        ({"labels": "no"}, r"unknown labels \(got 'no'\)"),
        ({"layout": "pack"}, r"unknown layout \(got 'pack'\); did you mean 'packed'"),
        ({"layout": "flat", "padding_side": "left"}, "joined documents have no padding side .*layout='flat'"),
        ({"layout": "packed", "max_length": 5}, "a packed row is as wide as its capacity"),
        ({"layout": "packed", "pad_to_multiple_of": 5}, "a packed row is as wide as its capacity"),
        ({"plan": "hiddenkey"}, r"plan must be a PlanSpec \(got str\)"),
        ({"buffers": -1}, "buffers must be .*got -1"),
        ({"buffers": 2000}, "buffers must be .*got 2000"),
        ({"vocabulary": 0}, "vocabulary must be .*got 0"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Collator(**change)


def test_widths_may_be_numpys_and_rows_do_not_wrap_around() -> None:
    store = make_store()
    wide = Collator(pad_to_multiple_of=np.uint8(64))(store.__getitems__([0, 1]))
    assert wide["input_ids"].shape[1] % 64 == 0
    for rows in (np.array([0], np.uint64) - np.uint64(1), [2**64 - 1]):
        with pytest.raises(DataError, match=r"row numbers lie below 2\^63 \(got 18446744073709551615\)"):
            store.__getitems__(rows)


def test_stores_that_do_not_fit() -> None:
    store = make_store(row_columns={"label": np.arange(40)})
    with pytest.raises(ConfigError, match=r"layout='packed' for a store that is not packed\); use store\.packed"):
        Collator(layout="packed")(store.__getitems__([0]))
    for layout in ("padded", "flat"):
        with pytest.raises(ConfigError, match=rf"layout='{layout}' for a packed store\); use layout='packed'"):
            Collator(layout=layout)(store.packed(64).__getitems__([0]))
    with pytest.raises(DataError, match=r"one label a token \(got one an example, layout='flat'\)"):
        Collator(layout="flat")(store.__getitems__([0]))
    assert "labels" in Collator(layout="flat", labels="tokens")(store.__getitems__([0]))
    with pytest.raises(DataError, match=r"the store has no labels \(got columns none\)"):
        Collator(labels="column")(make_store().__getitems__([0]))
    with pytest.raises(DataError, match=r"there is no such row \(got 40, the store has 40\)"):
        Collator()(store.__getitems__([0, 40]))
    with pytest.raises(DataError, match=r"row 1 holds a token id outside the vocabulary .*not in 0\.\.10\)"):
        Collator(vocabulary=10)(store.__getitems__([1]))
    assert len(Collator(vocabulary=1000)(store.__getitems__([1]))) == 4
    with pytest.raises(DataError, match="a batch needs rows"):
        Collator()(store.__getitems__([]))


def test_one_collator_for_several_stores() -> None:
    collator, first, second = Collator(), make_store(seed=1), make_store(seed=2)
    for store in (first, second, first):
        ids = collator(store.__getitems__([4]))["input_ids"][0]
        assert ids.tolist() == store[4]["input_ids"].tolist()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_tensors_do_not_share_a_version() -> None:
    """Labels may be changed in place between forward and backward: autograd must not take that for changed ids."""
    store = make_store()
    batch = Collator(labels="tokens")(store.__getitems__([0, 1, 2]))
    weight = torch.nn.Embedding(1000, 3)
    loss = weight(batch["input_ids"]).sum()
    batch["labels"][batch["labels"] == 7] = -100
    batch["attention_mask"].zero_()
    loss.backward()
    batch["input_ids"].zero_()
    assert store.values.min() > 0, "a store is never written to"


def test_buffers_take_turns() -> None:
    store = make_store()
    collator, plain = Collator(labels="tokens", buffers=2), Collator(labels="tokens")
    rows = [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9], [10, 11]]
    made = []
    for chosen in rows:
        batch = collator(store.__getitems__(chosen))
        equal(batch, plain(store.__getitems__(chosen)))
        made.append((batch, copy.deepcopy(batch)))
        for kept, before in made[-2:]:  # valid until two more were made
            equal(kept, before)
    again = [collator(store.__getitems__([0])) for _ in range(3)]
    assert again[0]["input_ids"].data_ptr() == again[2]["input_ids"].data_ptr() != again[1]["input_ids"].data_ptr()
    other = pickle.loads(pickle.dumps(collator))
    assert other(store.__getitems__([0]))["input_ids"].data_ptr() not in {b["input_ids"].data_ptr() for b in again}


def test_a_buffer_grows_as_it_must() -> None:
    ring = Ring(1, pin_memory=False)
    assert [ring.take(places).numel() for places in (5, 6, 3, 0)] == [5, 6, 3, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("buffers", [0, 2])
def test_page_locked_memory_needs_a_device(buffers: int) -> None:
    with pytest.raises(ConfigError, match=r"page-locked memory needs CUDA \(got pin_memory=True without a device\)"):
        Collator(pin_memory=True, buffers=buffers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("buffers", [0, 3])
def test_page_locked_memory(buffers: int) -> None:
    store = make_store()
    collator, plain = Collator(labels="tokens", pin_memory=True, buffers=buffers), Collator(labels="tokens")
    copies = []
    for start in range(0, 36, 4):
        rows = list(range(start, start + 4))
        batch = collator(store.__getitems__(rows))
        assert all(batch[name].is_pinned() for name in ("input_ids", "attention_mask", "labels"))
        copies.append((rows, {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}))
        if buffers:
            torch.cuda.synchronize()  # a buffer's copies must have ended before its turn comes again
    for rows, batch in copies:
        equal({name: value.cpu() for name, value in batch.items()}, plain(store.__getitems__(rows)))


def test_in_a_loaders_workers() -> None:
    store = full_store()
    spec = PlanSpec("hiddenkey", layers=1, heads=1, steps_per_epoch=100)
    collator, batches = pickle.loads(pickle.dumps(Collator(plan=spec))), [Rows([3, 1]), Rows([-1]), Rows([0, 39, 5])]
    loader = DataLoader(
        store, batch_sampler=batches, collate_fn=collator, num_workers=2, multiprocessing_context="fork"
    )
    for rows, batch in zip(batches, loader, strict=True):
        expected = collator(store.__getitems__(rows))
        plan, mask = batch.pop("mask_plan"), expected.pop("mask_plan").mask(0, "attention")
        assert plan.mask(0, "attention") == mask
        equal(batch, expected)


def test_buffers_are_not_for_workers() -> None:
    """There torch would move a buffer to shared memory, and its next batch would be written to memory that is gone."""
    loader = DataLoader(
        make_store(), batch_sampler=[[0]], collate_fn=Collator(buffers=2), num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(ConfigError, match=r"workers cannot keep buffers \(got buffers=2"):
        next(iter(loader))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
@pytest.mark.parametrize("layout", ["padded", "packed", "flat"])
def test_memory_is_flat(layout: str) -> None:
    store = make_store(rows=2000, longest=100)
    data = store.packed(256) if layout == "packed" else store
    collator = Collator(layout=layout, labels="tokens")
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, len(data), 8).tolist() for _ in range(500)]

    def run(times: int) -> int:
        for _ in range(times):
            for rows in batches:
                collator(data.__getitems__(rows))
        gc.collect()
        # What is there now; the peak that getrusage knows is of whatever test ran before in this process.
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024

    before = run(10)
    assert run(60) - before < 300, "KiB in 30,000 batches"
