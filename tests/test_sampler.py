"""The sampler: the same global batches on any number of ranks, from any position; states are few numbers and checked."""

from __future__ import annotations

import itertools
import json
import pickle
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hiddenkey_rs as hk
from hiddenkey_rs import BatchSampler, ConfigError, DataError, StateError
from hiddenkey_rs.loading.sampler import Rows

LENGTHS = np.random.default_rng(4).integers(0, 40, 230)
SIZES = [{"batch_size": 16}, {"batch_size": 7, "tail": "drop"}, {"token_budget": 300, "window": 64}]
KINDS = [(LENGTHS, sizes) for sizes in SIZES] + [(230, SIZES[0]), (230, SIZES[1])]


def steps_of(data: Any, ranks: int, micro: int, **arguments: Any) -> list[list[int]]:
    """Every step's samples, sorted, from what all ranks yield in one epoch; checks that they go in step."""
    samplers = [
        BatchSampler(data, rank=rank, world_size=ranks, accumulation=micro, **arguments) for rank in range(ranks)
    ]
    found: list[list[int]] = []
    yielded = [list(sampler) for sampler in samplers]
    assert {len(rows) for rows in yielded} == {len(BatchSampler(data, accumulation=micro, **arguments))}
    for together in zip(*yielded, strict=True):
        assert len({(rows.epoch, rows.step, rows.micro) for rows in together}) == 1
        if together[0].micro == 0:
            assert together[0].step == len(found)
            found.append([])
        for rows in together:
            assert rows == [-1] or min(rows) >= 0
            found[-1] += [row for row in rows if row >= 0]
    return [sorted(step) for step in found]


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    known=st.booleans(),
    batch_size=st.none() | st.integers(1, 130),
    spare=st.integers(0, 300),
    windows=st.none() | st.integers(1, 30),
    tail=st.sampled_from(["pad", "drop"]),
    ranks=st.integers(1, 64),
    micro=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_on_any_ranks(
    lengths, known, batch_size, spare, windows, tail, ranks, micro, shuffle, epoch
) -> None:
    assume(batch_size is None or tail == "pad" or batch_size <= len(lengths))
    known = known or batch_size is None
    arguments = {"batch_size": batch_size, "tail": tail, "shuffle": shuffle, "epoch": epoch}
    arguments["token_budget"] = None if batch_size else max(1, *lengths) + spare
    arguments["window"] = windows * (batch_size or 1) if windows and known else None
    data = lengths if known else len(lengths)
    alone = steps_of(data, 1, 1, **arguments)
    assert steps_of(data, ranks, micro, **arguments) == alone
    rows = [row for step in alone for row in step]
    dropped = len(lengths) % batch_size if batch_size and tail == "drop" else 0
    assert len(rows) == len(set(rows)) == len(lengths) - dropped
    sampler = BatchSampler(data, **arguments)
    assert [sorted(sampler.global_batch(step).tolist()) for step in range(sampler.steps)] == alone


def test_fewer_rows_than_places_are_padded() -> None:
    for data in (LENGTHS, 230):
        samplers = [BatchSampler(data, batch_size=5, world_size=4, rank=rank, accumulation=2) for rank in range(4)]
        first = [list(itertools.islice(sampler, 2)) for sampler in samplers]
        flat = [rows for mine in first for rows in mine]
        assert sorted(row for rows in flat for row in rows) == [
            -1,
            -1,
            -1,
            *sorted(samplers[0].global_batch(0).tolist()),
        ]
        assert flat.count([-1]) == 3


@pytest.mark.parametrize(("data", "sizes"), KINDS)
def test_an_exhausted_sampler_goes_on_with_the_next_epoch(data: Any, sizes: dict[str, Any]) -> None:
    sampler = BatchSampler(data, **sizes)
    first, second = list(sampler), list(sampler)
    assert {rows.epoch for rows in first} == {0}
    assert {rows.epoch for rows in second} == {1}
    assert sampler.epoch == 2
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(BatchSampler(data, epoch=1, **sizes)) == second


def test_an_iteration_broken_off_begins_again() -> None:
    sampler = BatchSampler(LENGTHS, batch_size=16)
    whole = list(BatchSampler(LENGTHS, batch_size=16))
    assert next(iter(sampler)) == whole[0]
    assert list(itertools.islice(sampler, 5)) == whole[:5]
    sampler.seek(3)
    assert list(itertools.islice(sampler, 5)) == whole[3:8]
    old = iter(sampler)
    assert list(sampler) == whole[3:]
    assert sampler.epoch == 1
    sampler.set_epoch(7)
    assert list(old) == whole[3:]
    assert sampler.epoch == 7, "an older iteration moved the sampler"


@pytest.mark.parametrize(("data", "sizes"), KINDS)
def test_seek_and_set_epoch(data: Any, sizes: dict[str, Any]) -> None:
    sampler = BatchSampler(data, accumulation=3, **sizes)
    whole = list(sampler)
    assert [rows.micro for rows in whole[:4]] == [0, 1, 2, 0]
    for step in (0, 1, sampler.schedule.steps(0) // 2, sampler.schedule.steps(0) - 1):
        sampler.set_epoch(0)
        sampler.seek(step)
        sampler.set_epoch(0)  # the same epoch again: the position stays
        assert len(sampler) == len(whole)
        rest = list(sampler)
        assert rest == whole[3 * step :]
        assert rest[0].step == step
    sampler.set_epoch(0)
    sampler.seek(sampler.steps)
    assert sampler.epoch == 1
    sampler.seek(2)
    sampler.set_epoch(5)
    assert next(iter(sampler)).step == 0


@settings(max_examples=60, deadline=None)
@given(
    kind=st.integers(0, len(KINDS) - 1),
    before=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    after=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    taken=st.integers(0, 200),
    seed=st.integers(0, 2**64 - 1),
)
def test_resumed_on_other_ranks(kind: int, before, after, taken: int, seed: int) -> None:
    """Broken off anywhere, with any ranks and accumulation, and resumed with others: the same global batches."""
    data, sizes = KINDS[kind]
    whole = steps_of(data, 1, 1, seed=seed, **sizes)
    first = BatchSampler(data, world_size=before[0], accumulation=before[1], seed=seed, **sizes)
    done = len(list(itertools.islice(first, taken))) // before[1]
    state = json.loads(json.dumps(first.state_dict()))
    assert (state["epoch"], state["step"]) == ((0, done) if done < len(whole) else (1, 0))
    assert state == first.state_dict(epoch=0, step=done)
    found: list[list[int]] = []
    ranks, micro = after
    for rank in range(ranks):
        sampler = BatchSampler(data, world_size=ranks, rank=rank, accumulation=micro, seed=seed, **sizes)
        sampler.load_state_dict(state)
        assert sampler.state_dict() == state
        sampler.set_epoch(state["epoch"])
        for rows in sampler:
            step = rows.step - state["step"]
            found += [[] for _ in range(step + 1 - len(found))]
            found[step] += [row for row in rows if row >= 0]
    expected = whole[done:] or steps_of(data, 1, 1, seed=seed, epoch=1, **sizes)
    assert [sorted(step) for step in found] == expected


def test_states_are_a_few_small_things() -> None:
    state = BatchSampler(LENGTHS, token_budget=300).state_dict()
    assert all(value is None or isinstance(value, (int, str)) for value in state.values())
    assert len(pickle.dumps(state)) < 400
    assert (state["version"], state["stream"], state["size"], state["tail"]) == (1, "hko1", 230, "pad")
    assert (state["batch_size"], state["token_budget"]) == (None, 300)
    assert len(state["digest"]) == 16
    assert BatchSampler(230, batch_size=3).state_dict()["digest"] == ""
    assert BatchSampler(LENGTHS.astype(np.int32), batch_size=3).digest == state["digest"]


def test_states_of_a_position_that_is_named() -> None:
    sampler = BatchSampler(LENGTHS, token_budget=300, window=64, accumulation=2)
    list(itertools.islice(sampler, 9))
    assert sampler.state_dict()["step"] == 4
    assert sampler.state_dict(step=2) == {**sampler.state_dict(), "step": 2, "window": 0, "batch": 2}
    assert sampler.state_dict(epoch=3)["step"] == 0
    assert sampler.state_dict(epoch=3, step=1)["epoch"] == 3
    with pytest.raises(ConfigError, match=r"step must be an integer in 0\.\.=\d+ \(got 9999\)"):
        sampler.state_dict(step=9999)


def test_a_store_is_known_by_its_digest() -> None:
    values = np.arange(12, dtype=np.int32)
    store = hk.TokenStore((values, np.array([0, 3, 7, 12])))
    other = hk.TokenStore((values[::-1].copy(), np.array([0, 3, 7, 12])))
    state = BatchSampler(store, batch_size=2).state_dict()
    assert state["digest"] == store.digest
    assert sorted(row for rows in BatchSampler(store, token_budget=8) for row in rows) == [0, 1, 2]
    BatchSampler(store, batch_size=2, world_size=2).load_state_dict(state)
    with pytest.raises(StateError, match=r"digest='\w+', not '\w+'\); pass the data that it was trained on"):
        BatchSampler(other, batch_size=2).load_state_dict(state)


BASE: dict[str, Any] = {"data": LENGTHS, "batch_size": 16, "seed": 3}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": LENGTHS[:-1]}, r"size=230, not 229\); pass the data that it was trained on"),
        ({"data": LENGTHS[::-1]}, r"digest='\w+', not '\w+'\); pass the data"),
        ({"data": 230}, r"digest='\w+', not ''\); pass the data"),
        ({"seed": 4}, r"seed=3, not 4\); pass the seed that it was trained with"),
        ({"batch_size": 8}, r"batch_size=16, not 8\); keep the global batch: change world_size and accumulation"),
        ({"batch_size": None, "token_budget": 400}, r"batch_size=16, not None\); keep the global batch"),
        ({"window": 32}, r"window_size=64, not 32\); pass the same window"),
        ({"tail": "drop"}, r"tail='pad', not 'drop'\); pass the same tail"),
        ({"shuffle": False}, r"shuffle=True, not False\); pass the same shuffle"),
    ],
)
def test_a_state_of_other_batches_is_refused(changed: dict[str, Any], message: str) -> None:
    state = BatchSampler(**{**BASE, "window": 64}).state_dict()
    sampler = BatchSampler(**{**BASE, "window": 64, **changed})
    before = sampler.state_dict()
    with pytest.raises(StateError, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == before


@pytest.mark.parametrize("sizes", [{"batch_size": 16}, {"token_budget": 300}])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 2}, r"version=2, not 1\); load it with the release that wrote it"),
        ({"stream": "hko0"}, r"stream='hko0', not 'hko1'\); load it with the release"),
        ({"seed": "3"}, r"seed='3', not 3"),
        ({"size": 230.0}, r"size=230\.0, not 230"),
        ({"epoch": -1}, r"is damaged \(got Position\(epoch=-1"),
        ({"epoch": 2**32}, r"is damaged \(got Position\(epoch=4294967296"),
        ({"step": "1"}, r"is damaged \(got Position\(epoch=0, step='1'"),
        ({"step": 1.0}, r"is damaged"),
        ({"step": True}, r"is damaged"),
        ({"step": 4}, r"is damaged \(got .*, where no batch begins\); use another checkpoint"),
        ({"step": 10**9}, r"where no batch begins"),
        ({"window": 99, "step": 99}, r"window=99, batch=3\), of \d windows"),
        ({"batch": 99, "step": 99}, r"where no batch begins"),
        ({"batch": None}, r"is damaged"),
        ({"world": 2}, r"is damaged \(got missing or unknown: world\)"),
    ],
)
def test_a_damaged_state_is_refused(sizes: dict[str, int], damage: dict[str, Any], message: str) -> None:
    sampler = BatchSampler(LENGTHS, window=96, seed=3, **sizes)
    good = sampler.state_dict(step=3)
    assert (good["window"], good["batch"]) == (0, 3)
    with pytest.raises(StateError, match=message):
        sampler.load_state_dict({**good, **damage})
    assert sampler.state_dict()["step"] == 0
    sampler.load_state_dict(good)
    assert next(iter(sampler)).step == 3


def test_a_state_behind_the_last_batch_is_refused() -> None:
    """The last of three windows has three of its six batches."""
    sampler = BatchSampler(LENGTHS, batch_size=16, window=96)
    assert sampler.steps == 15
    with pytest.raises(StateError, match=r"is damaged .*where no batch begins"):
        sampler.load_state_dict({**sampler.state_dict(), "step": 15, "window": 2, "batch": 3})


def test_a_state_that_is_none_is_refused() -> None:
    sampler = BatchSampler(LENGTHS, batch_size=16)
    for key in sampler.state_dict():
        state = sampler.state_dict()
        del state[key]
        with pytest.raises(StateError, match=rf"is damaged \(got missing or unknown: {key}\)"):
            sampler.load_state_dict(state)
    with pytest.raises(StateError, match=r"a sampler's state is a mapping \(got list\); pass what state_dict\(\) gave"):
        sampler.load_state_dict([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, r"world_size must be an integer in 1\.\.=1048576 \(got 0\); it counts the processes"),
        ({"world_size": -1}, r"world_size .*got -1"),
        ({"world_size": 2.0}, r"world_size .*got 2\.0"),
        ({"rank": 4, "world_size": 4}, r"rank must be an integer in 0\.\.=3 \(got 4\); ranks count from 0"),
        ({"rank": -1}, r"rank must be an integer in 0\.\.=0 \(got -1\)"),
        ({"rank": None}, r"rank .*got None"),
        ({"accumulation": 0}, r"accumulation must be an integer in 1\.\.=16777216 \(got 0\)"),
        ({"accumulation": 2**25}, r"accumulation .*got 33554432"),
        ({"epoch": -1}, r"epoch must be an integer in 0\.\.=4294967295 \(got -1\)"),
        ({"epoch": 2**32}, r"epoch .*got 4294967296"),
        ({"batch_size": 0}, r"batch_size .*got 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchSampler(**{**BASE, **arguments})


def test_calls_out_of_range_are_named() -> None:
    sampler = BatchSampler(LENGTHS, batch_size=16)
    with pytest.raises(ConfigError, match=r"step must be an integer in 0\.\.=14 \(got 15\); steps count from"):
        sampler.global_batch(15)
    with pytest.raises(ConfigError, match=r"step must be an integer in 0\.\.=15 \(got 16\)"):
        sampler.seek(16)
    with pytest.raises(ConfigError, match=r"epoch .*got 0\.5"):
        sampler.set_epoch(0.5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"at least one sample"):
        BatchSampler([], batch_size=1)
    with pytest.raises(ConfigError, match=r"too many micro-batches to count \(got 4611686018427387904 steps of 4\)"):
        BatchSampler(2**62, batch_size=1, accumulation=4)


def test_rows_travel() -> None:
    rows = next(iter(BatchSampler(LENGTHS, batch_size=6, epoch=2)))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(rows, protocol))
        assert isinstance(again, Rows)
        assert again == rows
        assert (again.epoch, again.step, again.micro) == (2, 0, 0)
    assert all(type(row) is int for row in rows)
    sampler = BatchSampler(LENGTHS, batch_size=6)
    sampler.seek(4)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def test_any_step_of_10_to_the_12_samples_is_found_at_once() -> None:
    sampler = BatchSampler(10**12, batch_size=32, world_size=8, rank=5)
    took = []
    for step in (1, 10**9, 3 * 10**10):
        start = time.process_time()
        sampler.seek(step)
        rows = next(iter(sampler))
        took.append(time.process_time() - start)
        assert rows.step == step
        assert rows == sampler.schedule.batch(0, step)[20:24].tolist()
    assert min(took) < 0.001


@pytest.mark.parametrize(("data", "sizes"), KINDS)
def test_memory_does_not_grow_with_steps(data: Any, sizes: dict[str, Any]) -> None:
    """10^5 steps may leave 1 MiB; 4,000 leave less than 20 KiB."""
    sampler = BatchSampler(data, **sizes)

    def run(steps: int) -> int:
        left = steps
        while left > 0:
            for _ in itertools.islice(sampler, left):
                left -= 1
            sampler.state_dict()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = run(500)
        assert run(4000) - before < 20_000
    finally:
        tracemalloc.stop()
