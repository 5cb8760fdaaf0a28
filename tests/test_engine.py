"""The engine: the same bits on every instruction set, thread count and split; forks, threads and Ctrl-C; memory reuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, DataError, MaskKey, masks

LEVELS = ("portable", "avx2", "avx512")
KEY = MaskKey(seed=5, step=6, layer=7)
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def many_cases() -> str:
    """One digest of several hundred random masks of every kind; run here and in other processes."""
    import hashlib

    import numpy as np

    from hiddenkey_rs import MaskKey, masks

    dice = np.random.Generator(np.random.PCG64(3))
    found = hashlib.sha256()
    for n in range(240):
        words = dice.integers(0, 2**63, 4, dtype=np.uint64).tolist()
        key = MaskKey(words[0] << 1, words[1] % 2**32, words[2] % 256, words[3] % 1024, "ffn")
        largest = 2 ** dice.uniform(0, 11 if n % 40 else 20)
        columns = int(2 ** dice.uniform(0, np.log2(largest)))
        rows = int(largest // columns)
        heads, rate = int(dice.integers(1, 4)), float(dice.choice([2**-16, 0.1, dice.random(), 1 - 2**-16]))
        ids = dice.integers(0, 2**40, 1 + n % 3)
        lengths = dice.integers(0, columns + 1, len(ids))
        packed = masks.element(key, ids, rows, columns, rate, heads)
        drawn = [packed.words, packed.to_bool(), masks.element_bool(key, ids, rows, columns, rate, heads)]
        drawn += [masks.column(key, ids, columns, rate, heads, lengths=lengths).words]
        drawn += [masks.span(key, ids, lengths, rate, heads, columns=columns).words]
        for array in drawn:
            found.update(array.tobytes())
    return found.hexdigest()


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if name not in ("HIDDENKEY_SIMD", "RAYON_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**keep, "PYTHONPATH": str(Path(__file__).parent), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def features() -> str:
    return Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.fixture(scope="module")
def expected() -> str:
    return many_cases()


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_makes_the_same_bits(level: str, expected: str) -> None:
    code = "import test_engine as t; from hiddenkey_rs import masks; print(masks.engine()['simd'], t.many_cases())"
    done = run(code, HIDDENKEY_SIMD=level)
    if f"(got '{level}')" in done.stderr.replace('"', "'"):
        assert "ConfigError: HIDDENKEY_SIMD names no instruction set of this processor" in done.stderr
        assert level.replace("avx512", "avx512bw") not in features(), "an instruction set that is there must be used"
        pytest.skip(f"this processor has no {level}")
    assert done.stdout.split() == [level, expected], done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(name: str) -> None:
    code = "from hiddenkey_rs import MaskKey, masks; masks.column(MaskKey(), [0], 1, .1)"
    for line in (code, "from hiddenkey_rs import masks; masks.engine()"):
        done = run(line, HIDDENKEY_SIMD=name)
        assert done.returncode == 1
        assert f'ConfigError: HIDDENKEY_SIMD names no instruction set of this processor (got "{name}")' in done.stderr
    assert run(code, HIDDENKEY_SIMD="").returncode == 0, "empty is unset"
    done = run(code, HIDDENKEY_SIMD="\udcff")  # a byte that is no UTF-8
    assert "ConfigError: HIDDENKEY_SIMD names no instruction set" in done.stderr


def test_memory_that_is_in_use_is_not_written_to() -> None:
    hidden = np.ones((4, 3), dtype=np.float32)
    with pytest.raises(DataError, match=r"written to while it is in use .*memory of its own for the result"):
        masks.drop_rows(np.ones(4, dtype=bool), 1.0, hidden, hidden)
    fixed = np.ones((4, 3), dtype=np.float32)
    fixed.flags.writeable = False
    with pytest.raises(DataError, match="memory that is only for reading"):
        masks.drop_rows(np.ones(4, dtype=bool), 1.0, hidden, fixed)


@pytest.fixture
def threads():
    before = masks.get_num_threads()
    yield masks.set_num_threads
    masks.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_thread_count_makes_the_same_bits(count: int, expected: str, threads) -> None:
    threads(count)
    assert hk.get_num_threads() == masks.engine()["threads"] == count
    assert many_cases() == expected


def test_thread_counts_are_checked(threads) -> None:
    before = hk.get_num_threads()
    for bad in (0, -1, 1025, 2**64, 1.0, "2", None, True, np.array([1, 2])):
        with pytest.raises(ConfigError, match=r"threads must be an integer in .*got "):
            hk.set_num_threads(bad)
    assert hk.get_num_threads() == before
    hk.set_num_threads(np.int8(3))
    assert hk.get_num_threads() == 3


def test_rayons_variable_is_honoured() -> None:
    code = "import hiddenkey_rs as hk; print(hk.get_num_threads())"
    default = run(code).stdout
    assert 1 <= int(default) <= (os.cpu_count() or 1)
    for asked, given in (("3", "3\n"), ("1", "1\n"), ("0", default), ("many", default), ("5000", "1024\n")):
        assert run(code, RAYON_NUM_THREADS=asked).stdout == given, asked
    for ranks, given in (("100000", "1\n"), ("1", default), ("none", default), ("0", default)):
        assert run(code, LOCAL_WORLD_SIZE=ranks).stdout == given, ranks
    assert run(code, LOCAL_WORLD_SIZE="9", RAYON_NUM_THREADS="3").stdout == "3\n"


@LINUX
def test_affinity_is_honoured() -> None:
    pin = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
    assert run(pin + "import hiddenkey_rs as hk; print(hk.get_num_threads())").stdout == "1\n"


@LINUX
def test_threads_are_those_asked_for() -> None:
    code = """
import glob, time, hiddenkey_rs as hk
def helpers(): return sum("hiddenkey" in open(name).read() for name in glob.glob("/proc/self/task/*/comm"))
def draw(count):
    hk.set_num_threads(count)
    hk.masks.element(hk.MaskKey(), [0], 2**10, 2**12, .1)
    for _ in range(200):  # a thread gives itself its name, some time after it was started
        if helpers() >= count - 1: break
        time.sleep(.01)
    return helpers()
print(helpers(), draw(1), draw(4), draw(2))
"""
    assert run(code).stdout.split() == ["0", "0", "3", "3"], "the calling thread works too; a large pool is kept"


def test_a_mask_of_many_pieces_is_the_sum_of_its_parts(threads) -> None:
    threads(2)
    ids = np.arange(7) * 2**37
    whole = masks.element(KEY, ids, 1000, 300, 0.3, heads=2).words
    for n, sample in enumerate(ids):
        assert np.array_equal(masks.element(KEY, [sample], 1000, 300, 0.3, heads=2).words[0], whole[n])
    assert np.array_equal(masks.element(KEY, ids, 10, 300, 0.3, heads=1).words, whole[:, :1, :10])


def test_threads_of_python_agree() -> None:
    expected = [masks.element(KEY, [n], 1 << 10, 1 << 10, 0.2).words.tobytes() for n in range(8)]
    wrong: list[int] = []

    def draw(first: int) -> None:
        for n in range(first, first + 16):
            if masks.element(KEY, [n % 8], 1 << 10, 1 << 10, 0.2).words.tobytes() != expected[n % 8]:
                wrong.append(n)

    workers = [threading.Thread(target=draw, args=(first,)) for first in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert wrong == []


def test_a_short_call_does_not_wait_for_a_long_one(threads) -> None:
    threads(2)
    expected = masks.element(KEY, [2], 1 << 10, 1 << 10, 0.2)
    long = threading.Thread(target=masks.element, args=(KEY, [1], 1 << 11, 1 << 20, 0.2))
    long.start()
    time.sleep(0.02)
    assert masks.element(KEY, [2], 1 << 10, 1 << 10, 0.2) == expected
    assert long.is_alive(), "the short call waited for the long one's helper"
    long.join()


FORKS = """
import os, signal, sys, threading
import hiddenkey_rs as hk
key, busy = hk.MaskKey(seed=1), sys.argv[1] == "busy"
def draw(n): return hk.masks.element(key, [n], 1 << 10, 1 << 10, .3).words.tobytes()
hk.set_num_threads(2)
expected = [draw(n) for n in range(4)]
stop = threading.Event()
def forever():
    while not stop.is_set():
        draw(9)
others = [threading.Thread(target=forever) for _ in range(2 * busy)]
for other in others: other.start()
bad = 0
for n in range(200):
    pid = os.fork()
    if not pid:
        signal.alarm(30)  # its default is to kill: a hang shows as a status
        same = draw(n % 4) == expected[n % 4] and draw(0) == expected[0]
        os._exit(0 if same else 1)
    bad += os.waitpid(pid, 0)[1] != 0
    bad += draw(n % 4) != expected[n % 4]
stop.set()
for other in others: other.join()
print(bad)
"""


@LINUX
@pytest.mark.parametrize("parent", ["idle", "busy"])
def test_forks_after_the_pool_was_used(parent: str) -> None:
    done = run(f"import sys; sys.argv = ['', {parent!r}]\n{FORKS}")
    assert done.stdout == "0\n", done.stderr


CALLS = {
    "element": "hk.masks.element(key, [0], 1 << 11, 1 << 20, .1)",
    "column": "hk.masks.column(key, [0, 1], 1 << 20, .1, heads=1024)",
    "plan": "hk.plan_step('dropkey-column', 0, [0, 1], [1 << 20] * 2, layers=1, heads=1024)",
}


@LINUX
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_stops_a_long_call(call: str, count: int) -> None:
    """A call of 1 s or more is stopped 0.3 s after it began. A loaded machine gets three tries to do so within 0.2 s."""
    code = f"""
import time, hiddenkey_rs as hk
key = hk.MaskKey()
hk.set_num_threads({count})
expected = hk.masks.column(key, [3], 99, .5)
print("go", flush=True)
try:
    {CALLS[call]}
except KeyboardInterrupt:
    print(time.monotonic(), hk.masks.column(key, [3], 99, .5) == expected)
"""
    waited = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "HIDDENKEY_SIMD": "portable"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            time.sleep(0.3)
            sent = time.monotonic()
            process.send_signal(signal.SIGINT)
            answer = process.stdout.read().split()
        assert process.returncode == 0
        assert answer[1:] == ["True"], "the call ended before it was stopped, or the engine does not work afterwards"
        waited.append(float(answer[0]) - sent)
        if waited[-1] < 0.2:
            return
    pytest.fail(f"stopping took {waited} s")


def test_a_process_ends_while_a_thread_draws() -> None:
    code = """
import threading, time, hiddenkey_rs as hk
def forever():
    while True:
        hk.masks.element(hk.MaskKey(), [0], 1 << 11, 1 << 15, .1)
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(.2)
print("done")
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_memory_can_be_reused() -> None:
    fresh = masks.element(KEY, [1, 2], 5, 70, 0.4, heads=3)
    words = np.full((2, 3, 5, 3), 0xFFFFFFFF, dtype=np.uint32)
    mask = masks.element(KEY, [1, 2], 5, 70, 0.4, heads=3, out=words)
    assert mask.words is words
    assert mask == fresh
    keep = np.ones((2, 3, 5, 70), dtype=np.bool_)
    assert mask.to_bool(keep) is keep
    assert np.array_equal(keep, fresh.to_bool())
    keep[...] = True
    assert masks.element_bool(KEY, [1, 2], 5, 70, 0.4, heads=3, out=keep) is keep
    assert np.array_equal(keep, fresh.to_bool())
    row = np.full((2, 3, 1, 3), 7, dtype=np.uint32)
    lengths = [70, 12]
    assert masks.column(KEY, [1, 2], 70, 0.4, heads=3, lengths=lengths, out=row).words is row
    assert np.array_equal(row, masks.column(KEY, [1, 2], 70, 0.4, heads=3, lengths=lengths).words)
    assert masks.span(KEY, [1, 2], lengths, 0.4, heads=3, out=row).words is row
    assert np.array_equal(row, masks.span(KEY, [1, 2], lengths, 0.4, heads=3).words)


def _read_only() -> np.ndarray:
    array = np.zeros((1, 1, 2, 2), np.uint32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((1, 1, 2, 2), np.int32), r"got int32 of shape \(1, 1, 2, 2\)\); pass uint32"),
        (np.zeros((1, 1, 2, 2), ">u4"), r"got >u4 of shape"),
        (
            np.zeros((1, 1, 2, 1), np.uint32),
            r"got uint32 of shape \(1, 1, 2, 1\)\); pass uint32 of shape \(1, 1, 2, 2\)",
        ),
        (np.zeros((2, 2), np.uint32), r"got uint32 of shape \(2, 2\)"),
        (np.zeros((1, 1, 2, 4), np.uint32)[..., ::2], "writeable, contiguous"),
        (np.frombuffer(bytearray(17), np.uint8)[1:].view(np.uint32).reshape(1, 1, 2, 2), "writeable, contiguous"),
        (_read_only(), "writeable, contiguous"),
        ([[[[0, 0], [0, 0]]]], r"out must be a NumPy array \(got list\)"),
    ],
)
def test_memory_that_does_not_fit_is_refused(out, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        masks.element(KEY, [1], 2, 33, 0.1, out=out)
    with pytest.raises(ConfigError, match="out must be"):
        masks.element(KEY, [1], 2, 33, 0.1).to_bool(out)


def test_lengths_may_be_ragged() -> None:
    ids, lengths = np.arange(60), np.arange(60) * 5
    whole = masks.column(KEY, ids, 300, 0.3, heads=2).to_bool()
    ragged = masks.column(KEY, ids, 300, 0.3, heads=2, lengths=lengths).to_bool()
    real = np.arange(300) < lengths[:, None, None, None]
    assert np.array_equal(ragged, whole & real)
    wide = masks.span(KEY, ids, lengths, 0.3, heads=2, columns=320).to_bool()
    assert np.array_equal(wide[..., :295], masks.span(KEY, ids, lengths, 0.3, heads=2).to_bool())
    assert not wide[..., 295:].any()
    with pytest.raises(DataError, match=r"length must lie in 0\.\.=300 \(got 301\)"):
        masks.column(KEY, [1], 300, 0.3, lengths=[301])
    with pytest.raises(DataError, match="1 lengths for 2 samples"):
        masks.column(KEY, [1, 2], 300, 0.3, lengths=[30])


def test_views_of_a_mask_unpack() -> None:
    mask = masks.element(KEY, [1, 2], 6, 70, 0.4)
    assert np.array_equal(hk.BitMask(mask.words[:, :, ::2], 70).to_bool(), mask.to_bool()[:, :, ::2])
    with pytest.raises(DataError, match=r"packed words are uint32 \(got int64\)"):
        hk.BitMask(np.zeros((1, 3), np.int64), 70).to_bool()
    with pytest.raises(DataError, match="2 words of 5 columns a row for 5 places"):
        hk.BitMask(np.zeros((1, 2), np.uint32), 5).to_bool()
