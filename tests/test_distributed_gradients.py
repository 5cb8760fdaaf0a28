"""One global batch gives the same gradients however it is spread: DDP and FSDP2 in a loop of one's own, over gloo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distributed_work as work
import hiddenkey_rs as hk
import ranks

pytestmark = pytest.mark.distributed

JS = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), None, consistency=hk.Consistency("js"), layers="latter-half")
SPANS = hk.HiddenKeyConfig(hk.AttentionDrop(pattern="span", rate=0.3), hk.HiddenDrop(rate=0.3), layers="latter-half")
_REFERENCES: dict[str, Any] = {}


def reference(**spec: Any) -> dict[str, np.ndarray]:
    """The whole batch in one process, once for every model and config."""
    key = repr(sorted(spec.items(), key=str))
    if key not in _REFERENCES:
        _REFERENCES[key] = ranks.run(1, work.gradients, spec)[0]["gradients"]
    return _REFERENCES[key]


def compare(world: int, wrap: str, accumulation: int = 1, tolerance: float = 2e-6, **spec: Any) -> list[dict[str, Any]]:
    expected = reference(
        **{name: value for name, value in spec.items() if name not in ("checkpointing", "bf16", "static")}
    )
    found = ranks.run(world, work.gradients, {**spec, "wrap": wrap, "accumulation": accumulation})
    largest = max(float(np.abs(value).max()) for value in expected.values())
    assert largest > 0.05
    for rank in found:
        assert rank["gradients"].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(rank["gradients"][name], value, rtol=0, atol=tolerance * largest, err_msg=name)
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_ddp(family: str) -> None:
    """Seven rows for eight micro-batches: one of them has a padding row, and must weigh nothing."""
    found = compare(4, "ddp", accumulation=2, family=family)
    assert [rank["padded"] for rank in found].count(1) == 1
    whole = ranks.run(1, work.gradients, {"family": family})[0]
    for site, counts in whole["counted"].items():
        if site.endswith("ffn"):
            parts = np.sum([rank["counted"].get(site, (0, 0)) for rank in found], axis=0)
            assert tuple(parts) == counts, "a padding row is not counted"


@pytest.mark.parametrize(
    ("family", "wrap"),
    [
        *(("bert", wrap) for wrap in ("layers", "root", "first")),
        *(("llama", wrap) for wrap in ("layers", "root", "head", "first")),
    ],
)
def test_fully_shard(family: str, wrap: str) -> None:
    """The second pass without gradient, layers that run once for both passes, and a head whose weight is spread."""
    compare(2, wrap, accumulation=2, family=family, config=SPANS)


@pytest.mark.parametrize(("wrap", "config"), [("head", work.BOTH), ("layers", JS), ("ddp", work.BOTH), ("ddp", SPANS)])
def test_checkpointing_and_every_kind_of_pass(wrap: str, config: hk.HiddenKeyConfig) -> None:
    compare(2, wrap, accumulation=4, family="llama", config=config, checkpointing=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_static_graph_averages_from_its_first_step_on(family: str) -> None:
    compare(2, "ddp", family=family, static=True)


def test_fully_shard_on_four_ranks_that_have_not_all_a_row() -> None:
    found = compare(4, "head", family="llama", rows=3)
    assert [rank["padded"] for rank in found] == [0, 0, 0, 1]
    compare(4, "layers", family="bert", rows=3)


def test_bfloat16_weights_by_fsdp() -> None:
    compare(2, "head", family="llama", bf16=True, tolerance=0.05)


def test_the_first_fsdp_is_refused() -> None:
    found = ranks.finish(ranks.start(2, work.first_fsdp))
    for rank in found:
        assert (rank.kind, "FSDP's first version flattens the model's weights" in rank.text) == (
            "UnsupportedModelError",
            True,
        )


def test_the_loop_that_the_docs_show() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "multi-node.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = code.replace("batch_size=256", "batch_size=8")
    [expected] = ranks.run(1, work.written_loop, code)
    for found in ranks.run(4, work.written_loop, code):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)
