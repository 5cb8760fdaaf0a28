"""Global batches: every sample once, the same for everybody, as the reference cuts them; shared out evenly."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hiddenkey_rs import ConfigError, DataError, _core, masks
from hiddenkey_rs.batches.schedule import Schedule
from reference import schedule as reference
from vectors import generate_order, read

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=70)


def epoch_batches(schedule: Schedule, epoch: int = 0) -> list[list[list[int]]]:
    """Every window's batches."""
    found = []
    for window in range(schedule.windows):
        batches = schedule.batches(epoch, window)
        found.append([batches[k].tolist() for k in range(len(batches))])
    return found


def flat(windows: list[list[list[int]]]) -> list[list[int]]:
    return [batch for batches in windows for batch in batches]


def test_schedule_vectors() -> None:
    seen = 0
    for kind, *rest in read("order.txt"):
        if kind != "schedule":
            continue
        size, seed, epoch, shuffle, batch_size, budget, window = map(int, rest[:7])
        schedule = Schedule.of(
            generate_order.lengths(size),
            batch_size=batch_size or None,
            token_budget=budget or None,
            window=window,
            tail=rest[7],
            shuffle=bool(shuffle),
            seed=seed,
        )
        windows = epoch_batches(schedule, epoch)
        assert len(windows) == int(rest[8])
        numbers = [n for batch in flat(windows) for n in (len(batch), *batch)]
        assert generate_order.numbers_digest(numbers) == rest[9]
        seen += 1
    assert seen >= 26


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.none() | st.integers(1, 80),
    spare=st.integers(0, 300),
    windows=st.none() | st.integers(1, 40),
    tail=st.sampled_from(["pad", "drop"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_batches_are_the_references(lengths, batch_size, spare, windows, tail, shuffle, seed, epoch) -> None:
    assume(batch_size is None or tail == "pad" or batch_size <= len(lengths))
    budget = None if batch_size else max(1, *lengths) + spare
    window = windows * (batch_size or 1) if windows else None
    sizes = {"batch_size": batch_size, "token_budget": budget, "tail": tail, "shuffle": shuffle, "seed": seed}
    schedule = Schedule.of(lengths, window=window, **sizes)
    expected = reference.global_batches(lengths, window=schedule.window, epoch=epoch, **sizes)
    assert epoch_batches(schedule, epoch) == expected
    batches = flat(expected)
    dropped = len(lengths) % batch_size if batch_size and tail == "drop" else 0
    assert len({row for batch in batches for row in batch}) == sum(map(len, batches)) == len(lengths) - dropped
    assert schedule.steps(epoch) == len(batches)
    for step in (0, len(batches) // 2, len(batches) - 1):
        assert schedule.batch(epoch, step).tolist() == batches[step]
        place, number = schedule.place(epoch, step)
        assert sum(map(len, expected[:place])) + number == step


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 64), micro=st.integers(1, 5))
def test_sharing_out_is_the_references(lengths: list[int], ranks: int, micro: int) -> None:
    schedule = Schedule.of(lengths, batch_size=len(lengths))
    batches = schedule.batches(0, 0)
    rows = batches[0].tolist()
    expected = reference.share([lengths[row] for row in rows], ranks, micro)
    for rank in range(ranks):
        mine = [part.tolist() for part in batches.share(0, ranks, micro, rank)]
        assert mine == [[rows[k] for k in run] for run in expected[rank]]


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 320),
    ranks=st.integers(1, 64),
    micro=st.integers(1, 5),
    tail=st.sampled_from(["pad", "drop"]),
    shuffle=st.booleans(),
)
def test_without_lengths_rows_are_counted(size, batch_size, ranks, micro, tail, shuffle) -> None:
    assume(tail == "pad" or batch_size <= size)
    schedule = Schedule.of(size, batch_size=batch_size, tail=tail, shuffle=shuffle, seed=9)
    order = reference.epoch_order(9, 2, size, shuffle)
    order = order[: size - size % batch_size] if tail == "drop" else order
    expected = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert schedule.steps(2) == schedule.windows == len(expected)
    for step, rows in enumerate(expected):
        assert schedule.batch(2, step).tolist() == rows
        assert schedule.place(2, step) == (step, 0)
        shared = [
            [part.tolist() for part in schedule.batches(2, step).share(0, ranks, micro, rank)] for rank in range(ranks)
        ]
        assert shared == reference.share_plain(rows, ranks, micro)


def test_batches_are_cut_by_hand() -> None:
    """Six examples in one window, not drawn: by length, at most 12 padded tokens, then the most even cut of as many."""
    lengths = [2, 6, 3, 1, 6, 2]
    schedule = Schedule.of(lengths, token_budget=12, window=6, shuffle=False)
    assert epoch_batches(schedule) == [[[1, 4], [2, 0, 5, 3]]]
    # 6 6 | 3 2 2 1 costs 12 and 12; under a budget of 13 nothing better is there.
    assert epoch_batches(Schedule.of(lengths, token_budget=13, window=6, shuffle=False)) == [[[1, 4], [2, 0, 5, 3]]]
    # Under 18: 6 6 3 | 2 2 1 would cost 18 and 6; the even cut is taken.
    assert epoch_batches(Schedule.of(lengths, token_budget=18, window=6, shuffle=False)) == [[[1, 4], [2, 0, 5, 3]]]
    assert epoch_batches(Schedule.of(lengths, batch_size=2, window=4, shuffle=False)) == [[[1, 2], [0, 3]], [[4, 5]]]
    assert epoch_batches(Schedule.of(lengths, batch_size=4, window=4, shuffle=False)) == [[[1, 2, 0, 3]], [[4, 5]]]
    assert epoch_batches(Schedule.of(lengths, batch_size=4, window=4, shuffle=False, tail="drop")) == [[[1, 2, 0, 3]]]


def test_no_length_is_last_or_left_out_more_often() -> None:
    """What the incomplete batch holds, and what is dropped, is drawn: over epochs, as long as the rest."""
    lengths = np.arange(1, 104)
    kept, last = [], []
    for epoch in range(400):
        kept += [
            lengths[batch].sum()
            for batch in flat(epoch_batches(Schedule.of(lengths, batch_size=10, tail="drop"), epoch))
        ]
        last.append(lengths[flat(epoch_batches(Schedule.of(lengths, batch_size=10), epoch))[-1]].mean())
        assert len(flat(epoch_batches(Schedule.of(lengths, batch_size=10), epoch))[-1]) == 3
    assert abs(np.sum(kept) / (400 * 100) - 52) < 0.3
    assert abs(np.mean(last) - 52) < 5 * 30 / np.sqrt(400)


def test_windows_by_default() -> None:
    """As many batches as a mega-batch of transformers has, in windows of equal size."""
    lengths = np.random.default_rng(0).integers(1, 60, 20_000)
    for batch_size in (1, 8, 100, 700, 30_000):
        schedule = Schedule.of(lengths, batch_size=batch_size)
        mega = min(50, max(1, 20_000 // (4 * batch_size)))
        assert mega / 1.5 <= schedule.window / batch_size <= mega * 1.5
        whole, last = schedule.window, 20_000 - (schedule.windows - 1) * schedule.window
        assert last > whole - schedule.windows * batch_size
    for budget in (100, 1000, 10_000):
        schedule = Schedule.of(lengths, token_budget=budget)
        batches = [len(window) for window in epoch_batches(schedule)]
        assert min(batches) >= 50 or len(batches) == 1
        assert max(batches) < 110


def test_by_tokens_little_is_padding() -> None:
    """Lengths as ragged as a mix of short sentences and long pairs; the goal is 3 %."""
    draw = np.random.default_rng(1)
    lengths = np.concatenate([3 + draw.exponential(10, 19_000).astype(int), draw.integers(20, 100, 1000)])
    for budget in (1024, 4096):
        schedule = Schedule.of(lengths, token_budget=budget)
        batches = flat(epoch_batches(schedule))
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert 1 - lengths.sum() / padded < 0.03
        assert all(len(batch) * lengths[batch].max() <= budget for batch in batches)
        means = np.array([lengths[batch].mean() for batch in batches])
        assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 5 / np.sqrt(len(means))


@pytest.mark.parametrize("ranks", [64, 1024])
def test_ranks_carry_the_same(ranks: int) -> None:
    """The goal is 1.02 for the heaviest rank over the mean, over an epoch's time."""
    draw = np.random.default_rng(2)
    lengths = np.concatenate([3 + draw.exponential(10, 950_000).astype(int), draw.integers(20, 100, 50_000)])
    schedule = Schedule.of(lengths, token_budget=2048 * ranks, window=1_000_000)
    batches = schedule.batches(0, 0)
    heaviest = total = 0.0
    for number in range(min(len(batches), 8)):
        sizes = lengths[batches[number]]
        bounds = batches.bounds(number, ranks, 1)[:, 0]
        costs = (bounds[:, 1] - bounds[:, 0]) * sizes[bounds[:, 0]]
        assert costs.min() > 0
        heaviest += costs.max()
        total += costs.mean()
    assert 1 <= heaviest / total < 1.02


def test_ten_million_lengths_are_counted_in_a_second() -> None:
    """On one thread; it takes a third of one. The best of three, because machines are busy."""
    lengths = np.random.default_rng(0).integers(1, 100, 10_000_000, dtype=np.int32)
    schedule = Schedule.of(lengths, token_budget=16384)
    took, threads = [], masks.get_num_threads()
    masks.set_num_threads(1)
    try:
        for epoch in range(3):
            start = time.process_time()
            assert schedule.steps(epoch) > 30_000
            took.append(time.process_time() - start)
    finally:
        masks.set_num_threads(threads)
    assert min(took) < 1
    start = time.process_time()
    schedule.steps(2)
    assert time.process_time() - start < 0.01, "the count of the latest epoch is kept"
    assert list(schedule._ends) == [2], "the count of another one was kept, too"


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint16, list, tuple])
def test_lengths_of_any_integers(dtype: Any) -> None:
    numbers = [3, 1, 4, 1, 5, 9, 2, 6]
    lengths = dtype(numbers) if dtype in (list, tuple) else np.array(numbers, dtype)
    expected = epoch_batches(Schedule.of(np.array(numbers), token_budget=12))
    assert epoch_batches(Schedule.of(lengths, token_budget=12)) == expected
    strided = np.repeat(np.array(numbers), 2)[::2]
    assert epoch_batches(Schedule.of(strided, token_budget=12)) == expected


def test_lengths_are_not_copied() -> None:
    lengths = np.array([3, 1, 4], np.int32)
    assert np.shares_memory(Schedule.of(lengths, batch_size=1).lengths, lengths)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (0, DataError, r"at least one sample \(got 0\); check that the data set was read"),
        ([], DataError, r"at least one sample \(got 0 lengths\)"),
        (-3, ConfigError, r"the number of samples must be an integer in 1\.\.=4611686018427387904 \(got -3\)"),
        (2**62 + 1, ConfigError, r"the number of samples .*got 4611686018427387905"),
        (True, ConfigError, r"data must be lengths, .* \(got bool\)"),
        ("abc", ConfigError, r"data must be lengths, .* \(got str\); pass a TokenStore"),
        (None, ConfigError, r"got NoneType"),
        (2.5, ConfigError, r"got float"),
        ([1.0, 2.0], DataError, r"one-dimensional array of integers \(got float64 of shape \(2,\)\)"),
        ([1, float("nan")], DataError, r"got float64"),
        ([[1], [2]], DataError, r"got int64 of shape \(2, 1\)"),
        ([True, False], DataError, r"got bool of shape"),
        ([[1], [2, 3]], DataError, r"got no array: "),
        ([4, -1, 5], DataError, r"a length must lie in 0\.\.=2147483647 \(got -1 of sample 1\)"),
        ([4, 2**31], DataError, r"got 2147483648 of sample 1"),
        (np.array([2**63], np.uint64), DataError, r"got 9223372036854775808 of sample 0"),
    ],
)
def test_data_that_is_none_is_named(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule.of(data, batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, r"got batch_size=None, token_budget=None\); give one of the two"),
        ({"batch_size": 2, "token_budget": 9}, ConfigError, r"got batch_size=2, token_budget=9"),
        ({"batch_size": 0}, ConfigError, r"batch_size must be an integer in 1\.\.=67108864 \(got 0\)"),
        ({"batch_size": -2}, ConfigError, r"batch_size .*got -2"),
        ({"batch_size": 2.0}, ConfigError, r"batch_size .*got 2\.0"),
        ({"batch_size": "2"}, ConfigError, r"batch_size .*got '2'"),
        ({"batch_size": 2**70}, ConfigError, r"batch_size .*got 1180591620717411303424"),
        (
            {"token_budget": 0},
            ConfigError,
            r"token_budget must be an integer in 1\.\.=\d+ \(got 0\); it counts the padded",
        ),
        ({"token_budget": 2**63}, ConfigError, r"token_budget .*got 9223372036854775808"),
        (
            {"token_budget": 6},
            DataError,
            r"longer than the token budget \(got 7 tokens of sample 2 for 6\); raise token_budget",
        ),
        ({"batch_size": 2, "window": 5}, ConfigError, r"window must be a multiple of batch_size=2 \(got 5\); use 4"),
        ({"batch_size": 2, "window": 0}, ConfigError, r"window must be an integer in 1\.\.=67108864 \(got 0\)"),
        ({"token_budget": 9, "window": 2**27}, ConfigError, r"window .*got 134217728"),
        ({"batch_size": 2, "tail": "wrap"}, ConfigError, r"unknown tail \(got 'wrap'\); use pad or drop"),
        ({"batch_size": 2, "shuffle": 2}, ConfigError, r"shuffle must be true or false \(got 2\)"),
        ({"batch_size": 2, "seed": -1}, ConfigError, r"seed must be an integer"),
        (
            {"batch_size": 9, "tail": "drop"},
            ConfigError,
            r"leave no batch \(got 4 samples for batch_size=9\); use tail='pad'",
        ),
    ],
)
def test_sizes_that_are_none_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule.of([4, 3, 7, 7], **arguments)


def test_tokens_need_lengths() -> None:
    with pytest.raises(
        ConfigError, match=r"token_budget needs lengths \(got 9 and a number of samples\); pass the lengths"
    ):
        Schedule.of(4, token_budget=9)
    Schedule.of(2**62, batch_size=2**31)
    assert Schedule.of(9, batch_size=2, window=5).windows == 5, "without lengths nothing is sorted"
    with pytest.raises(ConfigError, match=r"window .*got 'x'"):
        Schedule.of(9, batch_size=2, window="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batch_size must be an integer in 1\.\.=2147483648 \(got 2147483649\)"):
        Schedule.of(2**62, batch_size=2**31 + 1)


def test_lengths_changed_afterwards_are_found_by_the_core() -> None:
    lengths = np.array([4, 3, 7, 7], np.int32)
    schedule = Schedule.of(lengths, token_budget=9)
    lengths[1] = 90
    for look in (lambda: schedule.batches(0, 0), lambda: schedule.steps(0)):
        with pytest.raises(DataError, match=r"got 90 tokens of sample 1 for 9"):
            look()


def test_the_core_checks_for_itself() -> None:
    lengths, rows = np.array([4, 3], np.uint32), np.zeros(2, np.int64)
    with pytest.raises(DataError, match=r"at least one sample \(got 0\)"):
        _core.schedule((0, 0, True), (0, 1, 1, 0), lengths, 0, rows, rows.copy())
    with pytest.raises(DataError, match=r"room for 2 places, not 1"):
        _core.schedule((0, 0, True), (2, 1, 1, 0), lengths, 0, rows, rows.copy())
    with pytest.raises(DataError, match=r"sample must lie in 0\.\.=1 \(got 2\)"):
        _core.share(rows + 2, lengths, np.zeros((1, 1, 2), np.int64))
    with pytest.raises(ConfigError, match=r"epoch must lie in 0\.\.=4294967295 \(got 4294967296\)"):
        _core.order(0, 2**32, 2, 0, rows)
    with pytest.raises(DataError, match=r"position must lie in 0\.\.=1"):
        _core.order_at(0, 0, 2, 2, False)
