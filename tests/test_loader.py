"""The loader's batches are the store's rows, whoever makes them, whoever shares them and wherever it was stopped."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import hiddenkey_rs as hk
import ranks
from hiddenkey_rs import ConfigError, DataError, HiddenKeyError, StateError, build_dataloader
from hiddenkey_rs.loading.workers import LostWorkerError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # that is what is tried here

ALONE = {"rank": 0, "world_size": 1}
SAMPLES = 45


def store_of(samples: int = SAMPLES) -> hk.TokenStore:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 24, samples)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(1, 1000, offsets[-1]).astype(np.int32)
    types = random.integers(0, 2, offsets[-1])
    labels = random.integers(0, 3, samples)
    return hk.TokenStore((ids, offsets), token_columns={"token_type_ids": types}, row_columns={"labels": labels})


@pytest.fixture
def saved(tmp_path: Path) -> hk.TokenStore:
    return store_of().save(tmp_path / "s.arrow")


def numbers(batch: dict) -> list[int]:
    return batch["sample_id"].tolist()


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


# -- what is delivered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_rows(workers: int) -> None:
    """Against plain Python: every example of the sampler's rows, padded."""
    store = store_of()
    loader = build_dataloader(store, batch_size=7, accumulation=2, seed=5, num_workers=workers, **ALONE)
    plain = hk.BatchSampler(store, batch_size=7, accumulation=2, seed=5)
    assert len(loader) == len(plain) == 14
    seen: list[int] = []
    for batch, rows in zip(loader, list(plain), strict=True):
        width = max(len(store[row]["input_ids"]) for row in rows)
        for name, filler in (("input_ids", 0), ("token_type_ids", 0)):
            padded = [[*store[row][name].tolist(), *[filler] * (width - store.lengths[row])] for row in rows]
            assert batch[name].tolist() == padded
        assert batch["attention_mask"].sum(1).tolist() == store.lengths[list(rows)].tolist()
        assert batch["labels"].tolist() == [store[row]["labels"] for row in rows]
        assert numbers(batch) == list(rows)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        seen += rows
    assert sorted(seen) == list(range(SAMPLES))
    assert [numbers(batch) for batch in loader] != seen, "the next iteration is the next epoch"
    assert loader.batch_sampler.epoch == 2


CASES = [("fork", 1), ("fork", 2), ("fork", 8), ("forkserver", 2)]
SLOW_CASES = [("spawn", 8), ("forkserver", 8)]  # whose workers load torch anew


@pytest.mark.parametrize(
    ("method", "workers"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_workers_do_not_matter(method: str, workers: int, saved: hk.TokenStore) -> None:
    options = {"token_budget": 90, "seed": 3, "collator": hk.Collator(pad_token_id=7, position_ids=True), **ALONE}
    alone = list(build_dataloader(saved, **options))
    loader = build_dataloader(saved, num_workers=workers, multiprocessing_context=method, prefetch_factor=3, **options)
    assert same(list(loader), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_one_another(workers: int) -> None:
    options = {"batch_size": 8, "seed": 9, "num_workers": workers, **ALONE}
    loader = build_dataloader(store_of(), persistent_workers=workers > 0, **options)
    epochs = [[numbers(batch) for batch in loader] for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    loader.set_epoch(1)
    assert [numbers(batch) for batch in loader] == epochs[1]
    assert [numbers(batch) for batch in build_dataloader(store_of(), epoch=2, **options)] == epochs[2]


def test_packed_rows() -> None:
    store = store_of()
    store.row_columns.clear()  # a label an example would have no place
    loader = build_dataloader(store.packed(64), batch_size=4, num_workers=2, **ALONE)
    batches = list(loader)
    assert all(batch["input_ids"].shape[1] == 64 for batch in batches)
    assert sorted({n for batch in batches for n in batch["sample_id"].flatten().tolist()}) == [-1, *range(SAMPLES)]


def test_the_global_random_state_is_left_alone() -> None:
    for workers in (0, 2):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(build_dataloader(store_of(), batch_size=8, num_workers=workers, **ALONE))
        assert torch.equal(before, torch.get_rng_state())


def record(folder: Path, worker: int) -> None:
    (folder / str(worker)).write_text(str(hk.get_num_threads()))


def test_each_worker_has_one_thread(tmp_path: Path) -> None:
    loader = build_dataloader(
        store_of(),
        batch_size=8,
        num_workers=2,
        worker_init_fn=partial(record, tmp_path),
        multiprocessing_context="fork",
        **ALONE,
    )
    list(loader)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "1", "1": "1"}


# -- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_ranks_share_a_global_batch(tail: str) -> None:
    store = store_of()
    whole = build_dataloader(store, batch_size=10, tail=tail, **ALONE)
    for world, accumulation in ((2, 1), (3, 2), (16, 1)):
        parts = [
            list(
                build_dataloader(
                    store, batch_size=10, tail=tail, accumulation=accumulation, rank=rank, world_size=world
                )
            )
            for rank in range(world)
        ]
        steps = 4 if tail == "drop" else 5
        assert {len(part) for part in parts} == {steps * accumulation}
        whole.set_epoch(0)
        for step, batch in enumerate(whole):
            mine = [numbers(part[step * accumulation + micro]) for part in parts for micro in range(accumulation)]
            assert sorted(n for rows in mine for n in rows if n >= 0) == sorted(numbers(batch))
        whole.set_epoch(0)


def test_ranks_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = build_dataloader(store_of(), batch_size=8).batch_sampler
    assert (sampler.rank, sampler.world_size) == (1, 3)
    sampler = build_dataloader(store_of(), batch_size=8, rank=0).batch_sampler
    assert (sampler.rank, sampler.world_size) == (0, 3)
    sampler = build_dataloader(store_of(), batch_size=8, **ALONE).batch_sampler
    assert (sampler.rank, sampler.world_size) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE of the environment is no number \(got 'many'\)"):
        build_dataloader(store_of(), batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"rank must be an integer in 0\.\.=0 \(got 1\)"):
        build_dataloader(store_of(), batch_size=8)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    sampler = build_dataloader(store_of(), batch_size=8).batch_sampler
    assert (sampler.rank, sampler.world_size) == (0, 1)


# -- stopping and going on ----------------------------------------------------------------------------------------


def stateful(store: hk.TokenStore, workers: int, accumulation: int = 1, **options):
    given = {"batch_size": 8, "seed": 2, "prefetch_factor": 3 if workers else None, **ALONE, **options}
    return build_dataloader(store, accumulation=accumulation, num_workers=workers, stateful=True, **given)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (0, 3)])
def test_a_loader_goes_on_where_it_stopped(before: int, after: int) -> None:
    """At every place of an epoch, whatever was prefetched, with any number of workers."""
    store = store_of()
    whole = [numbers(batch) for batch in stateful(store, 0)]
    following = [numbers(batch) for batch in stateful(store, 0, epoch=1)]
    for stop in [0, 1, 3, 5, 6] if before or after else range(7):
        loader = stateful(store, before)
        batches = iter(loader)
        assert [numbers(next(batches)) for _ in range(stop)] == whole[:stop]
        state = loader.state_dict()
        assert all(type(value) in (int, str, bool, type(None)) for value in state.values())
        del batches
        again = stateful(store, after)
        again.load_state_dict(state)
        assert [numbers(batch) for batch in again] == (whole[stop:] or following)


def test_an_iteration_that_was_left_is_forgotten() -> None:
    store = store_of()
    for workers in (0, 2):
        loader = stateful(store, workers)
        first = [numbers(batch) for batch in loader]
        assert loader.state_dict() == stateful(store, 0, epoch=1).state_dict(), "at the next epoch"
        loader.set_epoch(5)
        assert loader.state_dict() == stateful(store, 0, epoch=5).state_dict()
        batches = iter(loader)
        next(batches)
        loader.load_state_dict(stateful(store, 0).state_dict())
        assert loader.state_dict() == stateful(store, 0).state_dict()
        assert [numbers(batch) for batch in loader] == first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_counts_whole_steps(workers: int) -> None:
    """Within a step: back to its first micro-batch."""
    store = store_of()
    whole = [numbers(batch) for batch in stateful(store, 0, accumulation=3)]
    assert len(whole) == 18
    for stop in (1, 2, 3, 4, 8, 17):
        loader = stateful(store, workers, accumulation=3)
        batches = iter(loader)
        for _ in range(stop):
            next(batches)
        again = stateful(store, 0, accumulation=3)
        again.load_state_dict(loader.state_dict())
        assert [numbers(batch) for batch in again] == whole[stop // 3 * 3 :]


def test_other_ranks_and_micro_batches_go_on() -> None:
    store = store_of()
    loader = stateful(store, 0)
    steps = [sorted(numbers(batch)) for batch in loader]
    loader.set_epoch(0)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    rest: list[list[int]] = [[] for _ in range(4)]
    for rank in range(2):
        part = stateful(store, 0, accumulation=2, rank=rank, world_size=2)
        part.load_state_dict(state)
        for place, batch in enumerate(part):
            rest[place // 2] += [n for n in numbers(batch) if n >= 0]
    assert [sorted(rows) for rows in rest] == steps[2:]
    plain = build_dataloader(store, batch_size=8, seed=2, **ALONE)
    plain.batch_sampler.load_state_dict(state)
    assert [sorted(numbers(batch)) for batch in plain] == steps[2:], "it is the sampler's own state"


def test_a_state_of_something_else() -> None:
    state = stateful(store_of(), 0).state_dict()
    with pytest.raises(StateError, match=r"got seed=2, not 3"):
        stateful(store_of(), 0, seed=3).load_state_dict(state)
    with pytest.raises(StateError, match=r"got size=45, not 44"):
        stateful(store_of(44), 0).load_state_dict(state)
    with pytest.raises(StateError, match=r"a sampler's state is a mapping \(got NoneType\)"):
        stateful(store_of(), 0).load_state_dict(None)


def test_without_torchdata(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "hiddenkey_rs.loading.stateful", raising=False)
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(HiddenKeyError, match=r"needs the package torchdata .*pip install torchdata"):
        stateful(store_of(), 0)


# -- accelerate ---------------------------------------------------------------------------------------------------


def prepared(loader):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(loader)


def test_accelerate_leaves_the_loader_alone() -> None:
    loader = build_dataloader(store_of(), batch_size=8, **ALONE)
    assert loader.device is None
    ours = prepared(loader)
    assert ours is loader
    assert loader.device == torch.device("cpu")
    assert same(list(ours), list(build_dataloader(store_of(), batch_size=8, **ALONE)))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_moved_once_accelerate_has_asked(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    state = accelerate.PartialState(cpu=True)
    monkeypatch.setattr(state, "device", torch.device("meta"))  # a device that is everywhere
    loader = build_dataloader(store_of().packed(64), batch_size=8, num_workers=workers, collator=joined(), **ALONE)
    assert loader._is_accelerate_prepared
    monkeypatch.undo()
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}
        assert isinstance(batch["max_length_q"], int), "what is no tensor stays"


def joined() -> hk.Collator:
    return hk.Collator(layout="packed", labels="tokens", cu_seqlens=True)


def test_accelerate_saves_a_stateful_loader(tmp_path: Path) -> None:
    from accelerate import Accelerator

    whole = [numbers(batch) for batch in stateful(store_of(), 0)]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(stateful(store_of(), 2))
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    again = accelerator.prepare(stateful(store_of(), 0))
    accelerator.load_state(str(tmp_path))
    assert [numbers(batch) for batch in again] == whole[4:]
    accelerator.free_memory()


def deal(workers: int) -> dict:
    """One rank's share of an epoch, through accelerate, while gradients are averaged in every step."""
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers of its own
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for name in ("RANK", "WORLD_SIZE"):  # torch.distributed knows them by now
        del os.environ[name]
    loader = build_dataloader(store_of(), batch_size=8, accumulation=2, num_workers=workers)
    place = (loader.batch_sampler.rank, loader.batch_sampler.world_size)
    stock = torch.utils.data.DataLoader(range(SAMPLES), batch_size=4)
    loader, stock = accelerator.prepare(loader, stock)
    weight = torch.nn.Linear(1, 1)
    model = accelerator.prepare(weight)
    rows = []
    for batch in loader:
        model(batch["sample_id"].float()[:, None]).sum().backward()
        rows.append(numbers(batch))
    repeats = [n for batch in stock for n in batch.tolist()]
    return {"rows": rows, "place": place, "stock": repeats, "moved": str(loader.device)}


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_under_accelerate(workers: int) -> None:
    first, second = ranks.run(2, deal, workers)
    assert (first["place"], second["place"]) == ((0, 2), (1, 2)), "of torch.distributed"
    assert len(first["rows"]) == len(second["rows"]) == 12
    mine = [n for rank in (first, second) for rows in rank["rows"] for n in rows if n >= 0]
    assert sorted(mine) == list(range(SAMPLES)), "none lost, none twice"
    assert len(first["stock"]) + len(second["stock"]) > SAMPLES, "which a loader that accelerate shards cannot say"
    assert first["moved"].startswith("cpu")
    alone = build_dataloader(store_of(), batch_size=8, **ALONE)
    for step, batch in enumerate(alone):
        parts = [n for rank in (first, second) for rows in rank["rows"][2 * step : 2 * step + 2] for n in rows]
        assert sorted(n for n in parts if n >= 0) == sorted(numbers(batch))


# -- processes that fork and die ----------------------------------------------------------------------------------


def busy_pool() -> None:
    """Let the core's threads work, so that a fork copies a pool that was used."""
    hk.masks.element(hk.MaskKey(0, 0, 0, 0, "ffn"), range(64), 512, 512, 0.1)
    hk.pack(np.full(300_000, 7), 64)


def work_after_fork(answers) -> None:
    busy_pool()
    answers.put([numbers(batch) for batch in build_dataloader(store_of(), batch_size=8, **ALONE)])


def fork_often(times: int) -> None:
    context = multiprocessing.get_context("fork")
    want = [numbers(batch) for batch in build_dataloader(store_of(), batch_size=8, **ALONE)]
    for _ in range(times):
        busy_pool()
        answers = context.Queue()
        child = context.Process(target=work_after_fork, args=(answers,))
        child.start()
        assert answers.get(timeout=60) == want
        child.join(60)
        assert child.exitcode == 0


def test_a_fork_after_the_pool_was_used_does_not_hang() -> None:
    threads = hk.get_num_threads()
    try:
        hk.set_num_threads(4)
        fork_often(5)
        busy_pool()
        assert (
            len(
                list(build_dataloader(store_of(), batch_size=8, num_workers=3, multiprocessing_context="fork", **ALONE))
            )
            == 6
        )
    finally:
        hk.set_num_threads(threads)


@pytest.mark.slow
def test_many_forks() -> None:
    threads = hk.get_num_threads()
    try:
        hk.set_num_threads(4)
        fork_often(40)  # test_engine has more, of a process that is smaller
    finally:
        hk.set_num_threads(threads)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def owner(name: str) -> int:
    """The process that made a tensor's file: torch_PID_RANDOM_COUNT."""
    return int(name.split("_")[1])


def alive(name: str) -> bool:
    return Path(f"/proc/{owner(name)}").exists()  # another test's, in a process beside this one


def lose_a_worker(stateful_too: bool, answers) -> None:
    options = {"num_workers": 2, "prefetch_factor": 8, "multiprocessing_context": "fork", "stateful": stateful_too}
    loader = build_dataloader(store_of(2000), batch_size=4, **options, **ALONE)
    batches = iter(loader)
    kept = [next(batches) for _ in range(3)]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever Python happens to be
    victim = multiprocessing.active_children()[0].pid
    os.kill(victim, signal.SIGKILL)
    try:
        kept.extend(batches)
    except LostWorkerError as error:
        answers.put((str(error), len(kept) < len(loader), victim))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm to look into")
@pytest.mark.parametrize("stateful_too", [False, True])
def test_a_killed_worker_ends_the_iteration_and_leaves_nothing(stateful_too: bool) -> None:
    before = shared_memory()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    trainer = context.Process(target=lose_a_worker, args=(stateful_too, answers))
    trainer.start()
    trainer.join(60)
    assert trainer.exitcode == 0
    message, early, victim = answers.get()
    assert re.match(r"a worker of the loader died \(got '.+'\); if memory ran out, use fewer workers or none", message)
    assert early
    del answers
    # torch takes a tensor's name away just after it made it: killed in between, a worker leaves that one file.
    left = {name for name in shared_memory() - before if name.startswith("torch") and not alive(name)}
    for name in left:
        os.unlink(f"/dev/shm/{name}")
    assert len(left) <= 1
    assert {owner(name) for name in left} <= {victim}


# -- hostile input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": None}, ConfigError, "batch_size"),
        ({"batch_size": 8, "token_budget": 100}, ConfigError, "batch_size.*token_budget|token_budget.*batch_size"),
        ({"batch_size": 0}, ConfigError, r"batch_size must be .*got 0"),
        ({"batch_size": None, "token_budget": 5}, DataError, "token_budget|budget"),
        ({"rank": 2, "world_size": 2}, ConfigError, r"rank must be .*got 2"),
        ({"world_size": 0}, ConfigError, r"world_size must be .*got 0"),
        ({"num_workers": -1}, ConfigError, r"num_workers must be an integer .*got -1"),
        ({"num_workers": "two"}, ConfigError, r"num_workers must be an integer .*got 'two'"),
        ({"prefetch_factor": 2}, ConfigError, "options do not fit .*prefetch_factor"),
        ({"persistent_workers": True}, ConfigError, "options do not fit .*persistent_workers"),
        ({"num_workers": 1, "multiprocessing_context": "thread"}, ConfigError, "options do not fit .*'thread'"),
        ({"num_workers": 1, "timeout": -1}, ConfigError, "options do not fit .*timeout"),
    ],
)
@pytest.mark.parametrize("stateful_too", [False, True])
def test_hostile_options(options: dict, error: type[Exception], message: str, stateful_too: bool) -> None:
    with pytest.raises(error, match=message):
        build_dataloader(store_of(), stateful=stateful_too, **{"batch_size": 8, **ALONE, **options})


def test_other_data_sets_are_named() -> None:
    with pytest.raises(ConfigError, match=r"a loader needs a store \(got list\); make a TokenStore"):
        build_dataloader([{"input_ids": [1, 2]}], batch_size=1)


def collate_nothing(error: type[Exception], batch) -> dict:
    raise error("of the collator")


@pytest.mark.parametrize("error", [RuntimeError, EOFError, ConnectionResetError, StateError])
def test_errors_of_a_collator_are_no_deaths(error: type[Exception]) -> None:
    options = {
        "num_workers": 1,
        "multiprocessing_context": "fork",
        "collator": partial(collate_nothing, error),
        **ALONE,
    }
    with pytest.raises(error, match=r"Caught \w+ in DataLoader worker(.|\n)*of the collator"):
        list(build_dataloader(store_of(), batch_size=8, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_rows_arrive_as_they_are(workers: int, tmp_path: Path) -> None:
    """In a worker, too: the type and the text."""
    store = store_of()
    store.values.setflags(write=True)
    store.values[:] = -5
    with pytest.raises(DataError, match="-5"):
        list(build_dataloader(store, batch_size=8, num_workers=workers, multiprocessing_context="fork", **ALONE))


# -- broken off within what was prefetched ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"token_budget": 120}], ids=["rows", "tokens"])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_prefetching_is_no_reason_for_the_next_epoch(taken: int, options: dict) -> None:
    """So few batches are all told to the workers at once: the epoch is over when the last one was delivered."""
    store = store_of()
    plain = [numbers(batch) for batch in build_dataloader(store, **options, **ALONE)]
    loader = build_dataloader(
        store, num_workers=2, prefetch_factor=8, multiprocessing_context="fork", **options, **ALONE
    )
    steps = len(loader)
    batches = iter(loader)
    assert [numbers(next(batches)) for _ in range(taken)] == plain[:taken]
    assert (loader.batch_sampler.epoch, len(loader)) == (0, steps)
    del batches
    assert [numbers(batch) for batch in loader] == plain, "broken off, it begins at the same place"
    assert loader.batch_sampler.epoch == 1
    assert [numbers(batch) for batch in loader] == [
        numbers(batch) for batch in build_dataloader(store, epoch=1, **options, **ALONE)
    ]


def test_an_epoch_that_was_set_meanwhile_stays() -> None:
    loader = build_dataloader(store_of(), batch_size=7, num_workers=2, multiprocessing_context="fork", **ALONE)
    for number, _ in enumerate(loader):
        if number == 2:
            loader.set_epoch(7)
    assert loader.batch_sampler.epoch == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_follows_who_moves_the_sampler(workers: int) -> None:
    pytest.importorskip("torchdata")
    loader = stateful(store_of(), workers)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(4)
    assert loader.state_dict() == stateful(store_of(), 0, epoch=4).state_dict()
    loader.batch_sampler.seek(2)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (4, 2)
    next(iter(loader))
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (4, 3)
