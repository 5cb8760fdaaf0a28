"""Every token's place in its document, where the rows of a batch do not say it: pieces of documents, and copies of one id."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hiddenkey_rs as hk
from hiddenkey_rs import Collator, ConfigError, PlanSpec, TokenStore
from hiddenkey_rs.attachment import tokens as attached
from hiddenkey_rs.loading.rows import RowBatch


def laid(batch: dict) -> attached.Tokens:
    places = attached.check_positions(batch.get("sample_position"), batch["sample_id"].numpy())
    return attached.from_packed(batch["sample_id"].numpy(), places, (0,), torch.device("cpu"))


def test_a_piece_knows_its_place() -> None:
    """What a piece drops is what the whole document drops there."""
    store = TokenStore((np.arange(30), np.array([0, 13, 16, 30])), sample_ids=[5, 6, 8])
    packed = store.packed(5, too_long="split")
    batch = Collator(layout="packed")(packed.__getitems__([*range(len(packed)), -1]))
    ids, places = batch["sample_id"], batch["sample_position"]
    assert places.dtype == torch.int64
    start = {5: 0, 6: 13, 8: 16}
    flat = [plane.flatten().tolist() for plane in (ids, places, batch["input_ids"])]
    for sample, place, token in zip(*flat, strict=True):
        assert place == -1 if sample < 0 else start[sample] + place == token
    drawn = hk.masks.column(hk.MaskKey(), [5, 6, 8], 14, 0.5, 1).to_bool()[:, 0, 0]
    found = laid(batch)
    keep = torch.from_numpy(hk.masks.column(hk.MaskKey(), found.samples, found.columns, 0.5, 1).to_bool()[:, :, 0])
    over = found.lay(keep)[:, 0]
    for row, column in (ids >= 0).nonzero().tolist():
        number = [5, 6, 8].index(ids[row, column])
        assert over[row, column] == bool(drawn[number, places[row, column]])


@pytest.mark.parametrize("layout", ["flat", "packed"])
def test_two_documents_of_one_id_side_by_side(layout: str) -> None:
    store = TokenStore((np.arange(9), np.array([0, 4, 8, 9])), sample_ids=[5, 5, 6])
    data = store.packed(9) if layout == "packed" else store
    batch = Collator(layout=layout)(data.__getitems__([0] if layout == "packed" else [0, 1, 2]))
    assert batch["sample_position"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert laid(batch).lengths.tolist() == [4, 4, 1]


def test_places_are_left_out_where_ids_say_as_much() -> None:
    store = TokenStore((np.arange(9), np.array([0, 4, 8, 9])), sample_ids=[5, 6, 5])
    assert "sample_position" not in Collator(layout="packed")(store.packed(9).__getitems__([0, -1, -1]))
    assert "sample_position" not in Collator()(store.__getitems__([0, 0]))


def test_plans_of_split_documents() -> None:
    store = TokenStore((np.arange(9), np.array([0, 4, 9])), sample_ids=[5, 6])
    packed = store.packed(4, too_long="split")
    column = PlanSpec(
        hk.HiddenKeyConfig(attention=hk.config.AttentionDrop(rate=0.5, pattern="column")), layers=1, heads=1
    )
    batch = RowBatch(packed, np.arange(len(packed)), 0, 0, 0)
    plan = Collator(layout="packed", plan=column)(batch)["mask_plan"]
    assert sorted({*zip(plan.samples.tolist(), plan.lengths.tolist(), strict=True)}) == [(5, 4), (6, 4), (6, 5)]
    span = PlanSpec(hk.HiddenKeyConfig(attention=hk.config.AttentionDrop(rate=0.5, pattern="span")), layers=1, heads=1)
    with pytest.raises(ConfigError, match=r"a span is drawn in a whole document, .*got attention pattern 'span'"):
        Collator(layout="packed", plan=span)(batch)
