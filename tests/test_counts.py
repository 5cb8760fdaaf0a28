"""What was dropped is added up when somebody asks, and collects nothing for ever."""

from __future__ import annotations

import torch

import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import counts


def test_numbers_of_the_host_and_of_the_device_add_up() -> None:
    tallies = [counts.Tally() for _ in range(3)]
    for n in range(200):
        tallies[0].add(torch.tensor(n), 2 * n)
        tallies[1].add(torch.tensor(1), torch.tensor(4))
    assert counts.read(tallies) == [(19900, 39800), (600, 800), (0, 0)]
    assert counts.read([]) == []
    for tally in tallies:
        assert max(len(tally.kept), len(tally.possible)) <= counts._MOST


def test_a_step_leaves_one_number_a_site_and_adds_nothing_up() -> None:
    model, batch = families.build("bert").train(), families.batch("bert")
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("hiddenkey-minus", rate=0.3), stock_dropout="off")
    for step in range(3):
        with handle.step(step, [5, 6, 7]):
            handle.loss(**batch)
    tallies = [(site.kind, tally) for site in handle.sites for tally in site.counts.values()]
    assert len(tallies) == 2 * families.LAYERS
    assert all(len(tally.kept) == 3 for _, tally in tallies)
    assert not any(tally.possible for kind, tally in tallies if kind == "ffn"), (
        "the host knows how many tokens there are"
    )
    assert {name: round(rate, 1) for name, rate in handle.realised().items()} == {"attention": 0.3, "ffn": 0.3}
    handle.reset_counts()
    assert handle.counted() == {}
