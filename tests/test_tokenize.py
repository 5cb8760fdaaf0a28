"""Tokens in a store are the tokenizer's own, however they were made; they are made once, and what is wrong is named."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from hiddenkey_rs import ConfigError, DataError, TokenStore
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import features, tasks
from hiddenkey_rs.experiments.models import byte_tokenizer
from hiddenkey_rs.loading import encode, texts
from hiddenkey_rs.loading.text import Tokenisation, tokenize
from hiddenkey_rs.loading.workers import LostWorkerError

datasets = pytest.importorskip("datasets")

ROWS = [{"a": f"text {n} " + "word " * (n % 7), "b": f"other {n * n}", "label": n % 3} for n in range(60)]


@pytest.fixture(scope="module")
def bert(minilm: Path):
    return transformers.AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def tiny():
    return byte_tokenizer()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several batches."""
    monkeypatch.setattr(texts.Texts.batches, "__defaults__", (7,))


def made(data, tokenizer, **choices) -> TokenStore:
    return tokenize(data, tokenizer, **{"progress": False, "text_fields": ("a",), **choices})


def rows_of(store: TokenStore, name: str = "input_ids") -> list[list[int]]:
    flat = store.values if name == "input_ids" else store.token_columns[name]
    return [flat[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


# -- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])  # nine batches: more than wait at once
@pytest.mark.parametrize("max_length", [None, 5])
@pytest.mark.parametrize("fields", [("a",), ("a", "b")])
@pytest.mark.usefixtures("small_batches")
def test_an_encoder_gets_what_its_tokenizer_says(bert, fields, max_length, processes: int) -> None:
    store = made(ROWS, bert, text_fields=fields, label_field="label", max_length=max_length, processes=processes)
    plain = [bert(*(row[f] for f in fields), truncation=max_length is not None, max_length=max_length) for row in ROWS]
    assert rows_of(store) == [one["input_ids"] for one in plain]
    assert store.values.dtype == np.int32
    if len(fields) == 2:
        assert rows_of(store, "token_type_ids") == [one["token_type_ids"] for one in plain]
    else:
        assert not store.token_columns, "types of single texts are all 0, and left out"
    assert store.row_columns["labels"].tolist() == [row["label"] for row in ROWS]
    assert store.sample_ids is None


@pytest.mark.parametrize("max_length", [None, 14, 40])
@pytest.mark.usefixtures("small_batches")
def test_targets_are_those_of_training(tiny, max_length: int | None) -> None:
    rows = [{"source": row["a"], "target": f"t{n}", "__line__": n} for n, row in enumerate(ROWS)]
    store = tokenize(rows, tiny, text_fields="source", target_field="target", max_length=max_length, progress=False)
    plain = features.tokenise(rows, tasks.TASKS["e2e"], tiny, max_length or 10**6, encoder_decoder=False)
    assert rows_of(store) == [one["input_ids"] for one in plain]
    assert rows_of(store, "labels") == [one["labels"] for one in plain]


@pytest.mark.parametrize("max_length", [None, 9, 1000])
def test_an_end_of_text(tiny, max_length: int | None) -> None:
    rows = [*ROWS, {"a": "ends by itself<eos>"}]
    store = made(rows, tiny, append_eos=True, max_length=max_length)
    for row, ids in zip(rows, rows_of(store), strict=True):
        plain = tiny(row["a"])["input_ids"][: None if max_length is None else max_length - 1]
        assert ids == plain + ([] if plain[-1] == tiny.eos_token_id else [tiny.eos_token_id])
        assert ids.count(tiny.eos_token_id) == 1


def test_wherever_the_text_comes_from(tiny, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=11)
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=13)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    whole = datasets.Dataset.from_list(ROWS)
    want = made(ROWS, tiny, label_field="label")
    sources = (table, tmp_path / "t.parquet", str(tmp_path / "t.arrow"), whole, str(tmp_path / "set"), tuple(ROWS))
    for source in sources:
        assert made(source, tiny, label_field="label").digest == want.digest
    shuffled = whole.shuffle(seed=3)
    assert rows_of(made(shuffled, tiny)) == [tiny(text)["input_ids"] for text in shuffled["a"]]


def test_labels_keep_their_kind(tiny) -> None:
    for labels, kind in (([1, 0, True], "int64"), ([0.5, 1, 2], "float64"), ([np.int8(3), np.int64(4), 5], "int64")):
        rows = [{"text": "x", "score": label} for label in labels]
        store = tokenize(rows, tiny, label_field="score", progress=False)
        assert store.row_columns["labels"].dtype == kind
        assert store.row_columns["labels"].tolist() == [float(label) for label in labels]


# -- once ---------------------------------------------------------------------------------------------------------


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenisation, "run", never)


def test_a_second_call_maps_the_file(tiny, tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "hiddenkey_rs.loading")
    first = made(ROWS, tiny, cache_dir=tmp_path / "new" / "cache", max_length=30)
    assert f"60 rows of tokens are kept in {first.path}" in caplog.text
    forbid(monkeypatch)
    for tokenizer in (tiny, byte_tokenizer()):
        second = made(pa.Table.from_pylist(ROWS), tokenizer, cache_dir=tmp_path / "new" / "cache", max_length=30)
    assert f"60 rows of tokens come from {first.path}" in caplog.text
    assert second.path == first.path
    assert rows_of(second) == rows_of(first)
    assert not second.values.flags.owndata


def test_whatever_changes_the_tokens_changes_the_key(tiny, bert) -> None:
    def key(rows=ROWS, tokenizer=tiny, fields=("a",), label=None, target=None, eos=False, most=None) -> str:
        return Tokenisation(
            texts.Texts.of(rows, fields, label, target), encode.Encoder(tokenizer, len(fields), eos, most)
        ).key()

    longer = byte_tokenizer()
    longer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    left = byte_tokenizer()
    left.truncation_side = "left"
    moved = [{**row, "a": row["a"] + "x"} if n == 59 else row for n, row in enumerate(ROWS)]
    joined = [{**ROWS[0], "a": ROWS[0]["a"] + ROWS[1]["a"][:3]}, {**ROWS[1], "a": ROWS[1]["a"][3:]}, *ROWS[2:]]
    keys = [
        key(),
        key(rows=ROWS[:-1]),
        key(rows=moved),
        key(rows=joined),
        key(rows=ROWS[::-1]),
        key(tokenizer=bert),
        key(tokenizer=longer),
        key(tokenizer=left),
        key(fields=("b",)),
        key(tokenizer=bert, fields=("a", "b")),
        key(label="label"),
        key(rows=[{**row, "label": float(row["label"])} for row in ROWS], label="label"),
        key(rows=[*ROWS[:-1], {**ROWS[-1], "label": 7}], label="label"),
        key(rows=[{"a": "x", "label": 0}], label="label"),
        key(rows=[{"a": "x", "label": 0.0}], label="label"),
        key(target="b"),
        key(eos=True),
        key(most=9),
        key(most=10),
    ]
    assert len(set(keys)) == len(keys)
    assert key(tokenizer=byte_tokenizer()) == keys[0], "names of objects and places do not matter"
    job = Tokenisation(texts.Texts.of(ROWS, "a", None, None), encode.Encoder(tiny, 1, False, None))
    tiny("cut and padded otherwise", max_length=3, truncation=True, padding="max_length")
    assert job.key() == keys[0], "nor does how the tokenizer was last used"


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "empty"])
def test_a_damaged_file_is_made_again(tiny, damage: str, tmp_path: Path, caplog) -> None:
    first = made(ROWS, tiny, cache_dir=tmp_path)
    path, whole = first.path, first.path.read_bytes()
    want = rows_of(first)
    if damage == "other":
        other = made(ROWS[:5], tiny, cache_dir=tmp_path / "other").path
        other.replace(path)
    else:
        place = whole.index(np.array(want[7], np.int32).tobytes())
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        path.write_bytes({"cut": whole[:-9], "flip": flipped, "empty": b""}[damage])
    second = made(ROWS, tiny, cache_dir=tmp_path)
    assert rows_of(second) == want
    assert path.read_bytes() == whole
    assert f"{path} is damaged or of something else: made again" in caplog.text


def ask(folder: Path, rows: list, answers) -> None:
    calls = []
    run = Tokenisation.run
    Tokenisation.run = lambda *a: (calls.append(1), run(*a))[1]  # type: ignore[method-assign]
    store = made(rows, byte_tokenizer(), cache_dir=folder)
    answers.put((len(calls), store.digest, str(store.path)))


def test_of_several_processes_one_works(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    workers = [context.Process(target=ask, args=(tmp_path, ROWS * 50, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    told = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(count for count, _, _ in told) == [0, 0, 0, 1]
    assert len({(digest, path) for _, digest, path in told}) == 1
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_cache_that_others_keep(tiny, tmp_path: Path, monkeypatch) -> None:
    """Where nothing may be written a kept store is still read: no lock is taken for that."""
    first = made(ROWS, tiny, cache_dir=tmp_path)
    for file in tmp_path.glob(".*.lock"):
        file.unlink()
    forbid(monkeypatch)
    assert made(ROWS, tiny, cache_dir=tmp_path).path == first.path
    assert [file.name for file in tmp_path.iterdir()] == [first.path.name]


def test_a_cache_that_cannot_be(tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"tokens cannot be kept there \(got '.*file/.*arrow'.*choose another place"):
        made(ROWS, tiny, cache_dir=tmp_path / "file")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("small_batches")
def test_progress_is_shown_where_somebody_watches(tiny, processes: int, monkeypatch) -> None:
    for watched in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        made(ROWS, tiny, processes=processes, progress=watched)
        assert ("60/60" in sys.stderr.getvalue()) == watched


# -- hostile input ------------------------------------------------------------------------------------------------


def bad(**fields) -> list:
    return [*ROWS[:3], {**ROWS[3], **fields}]


@pytest.mark.parametrize(
    ("data", "choices", "error", "message"),
    [
        ([], {}, DataError, r"nothing to tokenise \(got 0 rows\)"),
        (bad(a=None), {}, DataError, r"the field 'a' is no text \(got None in row 3\); mend"),
        (bad(a=5), {}, DataError, r"the field 'a' is no text \(got 5 in row 3\)"),
        (bad(a="x\ud800"), {}, DataError, r"'a' is no valid Unicode \(got half a character in row 3\)"),
        (bad(a=""), {}, DataError, r"comes to no tokens \(got row 3\); drop the row"),
        ([{"a": "x", "__line__": 8}, {"a": "", "__line__": 9}], {}, DataError, r"no tokens \(got line 9\)"),
        (
            [{"a": "x", "__line__": 8}, {"b": "", "__line__": 9}],
            {},
            DataError,
            r"'a' is absent \(got line 9 with fields b\)",
        ),
        (ROWS, {"text_fields": ("c",)}, DataError, r"the field 'c' is absent \(got row 0 with fields a, b, label\)"),
        (pa.table({"b": ["x"]}), {}, DataError, r"the field 'a' is absent \(got columns b\)"),
        ([*ROWS, 3], {}, DataError, r"must be a mapping of fields \(got int in row 60\)"),
        (
            bad(label="yes"),
            {"label_field": "label"},
            DataError,
            r"no number \(got 'yes' in row 3\); number the classes",
        ),
        (bad(label=None), {"label_field": "label"}, DataError, r"'label' is no number \(got None in row 3\); mend"),
        (bad(label=float("nan")), {"label_field": "label"}, DataError, r"no number \(got nan in row 3\)"),
        (
            bad(b="x" * 20),
            {"target_field": "b", "max_length": 21},
            DataError,
            r"does not fit \(got 21 tokens in row 3\).*\(21\)",
        ),
        ("no/such-set", {}, DataError, r"the data set cannot be loaded \(got 'no/such-set'"),
        (Path("no.parquet"), {}, DataError, r"does not exist \(got 'no.parquet'"),
        (Path(__file__), {}, DataError, r"not read here \(got '.*test_tokenize.py'\); give Parquet or Arrow"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            {},
            DataError,
            "splits train.*; choose one",
        ),
        (
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
            {},
            DataError,
            r"no rows to read \(got IterableDataset\)",
        ),
        (7, {}, DataError, r"no rows to read \(got int\)"),
        (ROWS, {"text_fields": ()}, ConfigError, r"one text field or a pair \(got \(\)\)"),
        (ROWS, {"text_fields": ("a", "b", "a")}, ConfigError, r"one text field or a pair \(got \('a', 'b', 'a'\)"),
        (
            ROWS,
            {"text_fields": ("a", "b"), "target_field": "a"},
            ConfigError,
            r"field before a target \(got \('a', 'b'\)",
        ),
        (
            ROWS,
            {"label_field": "label", "target_field": "b"},
            ConfigError,
            r"target to learn or a label .*'b' .*'label'",
        ),
        (ROWS, {"max_length": 0}, ConfigError, r"max_length must be an integer in 1..*got 0"),
        (ROWS, {"max_length": 1, "append_eos": True}, ConfigError, r"max_length must be an integer in 2..*got 1"),
        (ROWS, {"processes": 0}, ConfigError, r"processes must be an integer .*got 0"),
        (ROWS, {"processes": 2.0}, ConfigError, r"processes must be an integer .*got 2.0"),
    ],
)
def test_hostile_text(tiny, data, choices: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(data, tiny, **choices)


def test_hostile_tokenizers(tiny, bert) -> None:
    with pytest.raises(ConfigError, match=r"a tokenizer of transformers is needed \(got str\)"):
        made(ROWS, "minilm")
    with pytest.raises(ConfigError, match=r"no end-of-text token \(got \w+\); set its eos_token"):
        made(ROWS, bert, target_field="b")
    with pytest.raises(ConfigError, match="an end of text is for decoders"):
        made(ROWS, bert, text_fields=("a", "b"), append_eos=True)


@pytest.mark.usefixtures("small_batches")
def test_errors_and_deaths_in_other_processes(tiny) -> None:
    with pytest.raises(DataError, match=r"comes to no tokens \(got row 50\)"):
        made([*ROWS[:50], {"a": ""}, *ROWS], tiny, processes=2)
    here = os.getpid()

    class Deadly:
        eos_token_id = 0

        def __call__(self, *args, **choices):
            if os.getpid() != here:
                os._exit(9)
            return {"input_ids": [[1]]}

    with pytest.raises(LostWorkerError, match=r"a process died while it tokenised \(got 2 processes\)"):
        made(ROWS, Deadly(), processes=2)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_makes_a_store_once(tmp_path: Path, capsys, tiny) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "s.arrow"
    source.write_text("\n".join(json.dumps(row) for row in ROWS))
    given = ["tokenize", "--model", "gpt2-tiny", "--file", str(source), "--text-fields", "a", "--out", str(out)]
    assert main([*given, "--label-field", "label"]) == 0
    first = capsys.readouterr()
    want = made(ROWS, tiny, label_field="label")
    sizes = sorted(want.lengths.tolist())
    lines = first.out.splitlines()
    assert lines[0] == f"{out}: 60 rows, {len(want.values):,} tokens; input_ids, labels"
    assert lines[1] == (
        f"tokens a row: least {sizes[0]}, 10 % {sizes[5]}, half {sizes[29]}, 90 % {sizes[53]}, 99 % {sizes[59]}, "
        f"most {sizes[-1]}"
    )
    assert lines[2].endswith("tokens/s")
    assert lines[3] == f"digest {want.digest}"
    assert first.err == "", "no bar where nobody watches"
    before = out.stat().st_mtime_ns
    assert main([*given, "--label-field", "label"]) == 0
    second = capsys.readouterr().out.splitlines()
    assert second[2].endswith("s, the file held these tokens already")
    assert [*second[:2], second[3]] == [*lines[:2], lines[3]]
    assert out.stat().st_mtime_ns == before
    assert main(given) == 0
    assert TokenStore(out).row_columns == {}, "other choices make it anew"


def test_the_command_reads_tables_and_tasks(tmp_path: Path, capsys, data_dir: Path, bert) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    common = ["tokenize", "--model", "minilm", "--out", str(tmp_path / "s.arrow")]
    assert main([*common, "--file", str(tmp_path / "t.parquet"), "--text-fields", "a", "b"]) == 0
    assert TokenStore(tmp_path / "s.arrow").digest == made(ROWS, bert, text_fields=("a", "b")).digest
    assert main([*common, "--task", "mrpc", "--data", str(data_dir), "--split", "dev"]) == 0
    store = TokenStore(tmp_path / "s.arrow")
    assert (len(store), sorted(store.token_columns), list(store.row_columns)) == (408, ["token_type_ids"], ["labels"])
    assert main([*common[:2], "gpt2-tiny", *common[3:], "--task", "demo"]) == 0
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert main([*common, "--dataset", str(tmp_path / "set"), "--text-fields", "a"]) == 0
    assert "60 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--file", "no.jsonl"], "there is no such data file (got 'no.jsonl')"),
        (["--file", "no.arrow"], "does not exist (got 'no.arrow')"),
        (["--file", "F", "--out", "s.parquet"], "a store is an Arrow file (got 's.parquet')"),
        (["--file", "F", "--out", "no/s.arrow"], "cannot be written (got 'no/s.arrow')"),
        (["--file", "F"], "the field 'text' is absent"),
        (["--file", "F", "--task", "mrpc"], "not allowed with argument"),
        (["--task", "e2e"], "(got 'e2e' without data); give --data DIR"),
        (["--task", "e2e", "--data", "."], "does not hold the task"),
        (["--task", "demo", "--split", "tset"], "no such split (got 'tset'); it has train, dev"),
        (["--task", "demo", "--text-fields", "a"], "(got --text-fields); leave it out"),
        (["--dataset", "no/such-set"], "the data set cannot be loaded (got 'no/such-set'"),
        (["--model", "no/such-model", "--file", "F"], "the tokenizer cannot be loaded (got 'no/such-model'"),
        ([], "one of the arguments --file --task --dataset is required"),
    ],
)
def test_the_command_names_what_is_wrong(flags: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text('{"a": "x"}\n')
    flags = ["f.jsonl" if flag == "F" else flag for flag in flags]
    assert main(["tokenize", "--model", "gpt2-tiny", "--out", "s.arrow", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hiddenkey: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*.arrow"))


class Slow:
    """An encoder that says which process works, and takes its time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, batch):
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.2)
        return batch


def spread_for_ever(folder: Path) -> None:
    class Source:
        def batches(self):
            while True:
                yield 0

    for _ in Tokenisation(Source(), Slow(folder))._encoded(2):
        pass


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes live")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """They would wait for work for ever, and hold the lock that they were forked with."""
    parent = multiprocessing.get_context("fork").Process(target=spread_for_ever, args=(tmp_path,))
    parent.start()
    try:
        until = time.monotonic() + 60
        while len(workers := [int(file.name) for file in tmp_path.iterdir()]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.join()
    until = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < until, "they outlive it"
        time.sleep(0.05)
