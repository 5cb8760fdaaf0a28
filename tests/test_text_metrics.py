"""Text metrics against published values, the published tools, and sums by hand; calibration; tasks cut from others."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenkey_rs import ConfigError, DataError
from hiddenkey_rs.experiments import data, metrics, tasks, text_metrics
from hiddenkey_rs.experiments.text_metrics import caption_words, score_parts, score_texts

CAPTIONS = importlib.util.find_spec("pycocoevalcap") is not None
captions = pytest.mark.skipif(not CAPTIONS, reason="the extra 'captions' is not installed")
java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")

# sacrebleu's README: one reference set a line.
DOG = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
DOG_REFS = list(
    zip(
        ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
        ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
        strict=True,
    )
)

# Scored by github.com/tuetschek/e2e-metrics at 1b9c4d8 (its Python mteval; Penn Treebank's tokenizer before the
# captioning metrics): case, punctuation, clitics, prices, several and single references.
PUBS = [
    "The Blue Door is a cheap Italian restaurant near the river.",
    "Kid-friendly food isn't served at The Old Mill, a pub.",
    "The Crown serves dinner for £20-25.",
]
PUB_REFS = [
    [
        "The Blue Door is a cheap restaurant by the river that serves Italian food.",
        "Near the river there is a cheap Italian place, The Blue Door.",
    ],
    [
        "The Old Mill is a pub that isn't kid-friendly.",
        "The pub The Old Mill isn't a place for kids.",
        "The Old Mill, a pub, doesn't welcome children.",
    ],
    ["At The Crown, dinner is £20-25."],
]
PUB_SCORES = {"bleu": 48.62348900150535, "nist": 4.823062456209894}
PUB_CAPTIONS = {"rouge_l_coco": 64.27391211037897, "cider": 3.51488210162472}


def scored(texts: list[str], references: list, *names: str) -> dict[str, float]:
    found = score_texts(texts, references, names)
    assert not found.absent
    return found.values


# -- values ---------------------------------------------------------------------------------------------------------


def test_sacrebleu_as_published() -> None:
    found = scored(DOG, DOG_REFS, "bleu", "chrf")
    assert found == pytest.approx({"bleu": 48.53, "chrf": 59.73}, abs=0.005)


def test_mteval_as_the_e2e_challenge() -> None:
    assert scored(PUBS, PUB_REFS, *PUB_SCORES) == pytest.approx(PUB_SCORES, abs=1e-6)


@captions
def test_captioning_metrics_as_the_e2e_challenge() -> None:
    assert scored(PUBS, PUB_REFS, *PUB_CAPTIONS) == pytest.approx(PUB_CAPTIONS, abs=1e-6)


@captions
@java
@pytest.mark.slow
def test_meteor_as_the_e2e_challenge() -> None:
    assert scored(PUBS, PUB_REFS, "meteor")["meteor"] == pytest.approx(43.9940373021058, abs=1e-4)


def test_ter_by_hand() -> None:
    assert scored(["a b c d"], [["a b d"]], "ter")["ter"] == pytest.approx(100 / 3)  # one deletion, three words
    assert scored(["c a b"], [["a b c"]], "ter")["ter"] == pytest.approx(100 / 3)  # one shift
    assert scored(["a b."], [["A b c."]], "ter")["ter"] == pytest.approx(100 / 4)  # a full stop is a word
    # one edit to the nearest reference, over the references' mean length of (2 + 4) / 2; then none over 5
    assert scored(["a b c", "A b c d e"], [["a b", "v w x y"], ["a b c d e"]], "ter")["ter"] == pytest.approx(100 / 8)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the quick brown jumps the": 5 of 8 and of 9 words
    text, ref = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert scored([text], [[ref]], "rouge_l")["rouge_l"] == pytest.approx(100 * 2 * 5 / (8 + 9))
    # the better reference counts, and texts count alike
    assert scored([text, "x"], [["nothing", ref], ["y"]], "rouge_l")["rouge_l"] == pytest.approx(100 * 5 / (8 + 9))


def test_nist_by_hand() -> None:
    # References: a b, a c. Information of a: log2(4 / 2), b: log2(4 / 1), "a b": log2(2 / 1).
    found = scored(["a b", "a d"], [["a b"], ["a c"]], "nist")["nist"]
    assert found == pytest.approx((1 + 2 + 1) / 4 + 1 / 2)
    # Two words for three: the penalty is one half.
    assert scored(["a b"], [["a b b"]], "nist")["nist"] == pytest.approx(
        0.5 * ((np.log2(3) + np.log2(3 / 2)) / 2 + 0.0), abs=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.text("abc", min_size=5, max_size=9)] * 2), min_size=1, max_size=4))
def test_nist_is_nltks_where_there_is_one_reference(pairs: list[tuple[str, str]]) -> None:
    from nltk.translate.nist_score import corpus_nist

    texts, refs = [" ".join(a) for a, _ in pairs], [[" ".join(b)] for _, b in pairs]
    wanted = corpus_nist([[ref.split() for ref in group] for group in refs], [text.split() for text in texts])
    assert scored(texts, refs, "nist")["nist"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Vaults, a pub - it's £20-25!", "the vaults a pub it 's # 20-25"),
        ("They don’t; we'll (maybe) pay 1,000.50.", "they do n't we 'll ( maybe ) pay 1,000.50"),
        ("'Café', 5 out of 5.", "café 5 out of 5"),
        ("riverside,near the U.S. river", "riverside near the u.s. river"),
        ("5,then 6, 7", "5 then 6 7"),
        ("  ?! ", ""),
    ],
)
def test_words_of_the_captioning_metrics(text: str, words: str) -> None:
    assert caption_words(text) == words


@pytest.mark.data
@captions
def test_scores_of_real_references(data_dir: Path) -> None:
    """The first reference of every E2E development group against the others, as e2e-metrics scores them."""
    with gzip.open(data_dir / "E2E" / "dev_grouped.jsonl.gz", "rt", encoding="utf-8") as file:
        groups = [json.loads(line)["refs"] for line in file]
    texts, refs = [group[0] for group in groups], [group[1:] for group in groups]
    found = scored(texts, refs, "bleu", "nist", "rouge_l_coco", "cider")
    assert found["bleu"] == pytest.approx(59.953459, abs=1e-5)
    assert found["nist"] == pytest.approx(8.578516, abs=1e-5)
    # Penn Treebank's tokenizer splits 6 of the 4,672 texts elsewhere.
    assert found["rouge_l_coco"] == pytest.approx(65.28351, rel=1e-4)
    assert found["cider"] == pytest.approx(1.854275, rel=5e-4)


# -- several parts, errors ------------------------------------------------------------------------------------------


def test_parts() -> None:
    found = score_parts(DOG, DOG_REFS, ["seen", "unseen", "seen"], ["bleu", "ter"])
    assert list(found) == ["all", "seen", "unseen"]
    assert found["all"] == score_texts(DOG, DOG_REFS, ["bleu", "ter"])
    assert found["seen"] == score_texts([DOG[0], DOG[2]], [DOG_REFS[0], DOG_REFS[2]], ["bleu", "ter"])
    assert found["unseen"] == score_texts([DOG[1]], [DOG_REFS[1]], ["bleu", "ter"])
    assert list(score_parts(DOG, DOG_REFS, ["seen"] * 3, ["ter"])) == ["all"]
    assert list(score_parts(DOG, DOG_REFS, [None] * 3, ["ter"])) == ["all"]
    with pytest.raises(DataError, match=r"every text has a part \(got 3 texts, 1 parts\)"):
        score_parts(DOG, DOG_REFS, ["seen"])


@pytest.mark.parametrize(
    ("texts", "refs", "message"),
    [
        ([], [], r"nothing to score \(got no texts\)"),
        (["a"], [["a"], ["b"]], r"\(got 1 texts, 2 groups of references\)"),
        (["a", "b"], [["a"], []], r"a group has no references \(got \[\] in group 1\)"),
        (["a", "b"], [["a"], [" "]], r"a group has no references \(got \[' '\] in group 1\)"),
        (["", " "], [["a"], ["b"]], r"all texts are empty \(got 2 of them\)"),
    ],
)
def test_what_cannot_be_scored(texts: list[str], refs: list[list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_texts(texts, refs)


def test_a_metric_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"no such text metric \(got 'blue'\); use bleu, chrf"):
        score_texts(["a"], [["a"]], ["bleu", "blue"])


def test_an_empty_text_among_others_scores_nothing() -> None:
    names = [name for name in text_metrics.METRICS if name != "meteor" and (CAPTIONS or name not in PUB_CAPTIONS)]
    full = scored([*PUBS, "x y"], [*PUB_REFS, ["x y"]], *names)
    found = scored([*PUBS, ""], [*PUB_REFS, ["x y"]], *names)
    for name in names:
        assert (found[name] > full[name]) == (name in text_metrics.LOWER_IS_BETTER), name


def test_what_is_missing_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sacrebleu.metrics", "pycocoevalcap.cider.cider", "pycocoevalcap.meteor.meteor"):
        monkeypatch.setitem(sys.modules, module, None)
    found = score_texts(DOG, DOG_REFS, ["bleu", "cider", "meteor", "rouge_l"])
    assert list(found.values) == ["rouge_l"]
    assert list(found.absent) == ["bleu", "cider", "meteor"]
    assert "with its extra [text]" in found.absent["bleu"]
    assert "with its extra [captions]" in found.absent["cider"]


@captions
def test_meteor_without_java_or_with_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def compute_score(self, *_: object) -> None:
            self.lock.acquire()
            float("")

    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    assert "got no java on the path" in score_texts(DOG, DOG_REFS, ["meteor"]).absent["meteor"]
    broken = Broken()
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: "java")
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", lambda: broken)
    assert "METEOR's program failed (got could not convert" in score_texts(DOG, DOG_REFS, ["meteor"]).absent["meteor"]
    assert not broken.lock.locked()


@captions
def test_cider_of_one_group_is_absent() -> None:
    assert "got one group" in score_texts(PUBS[:1], PUB_REFS[:1], ["cider"]).absent["cider"]


# -- calibration ----------------------------------------------------------------------------------------------------


def sure(*confidences: float) -> np.ndarray:
    return np.array([[value, 1 - value] for value in confidences])


def test_calibration_by_hand() -> None:
    ece = metrics.expected_calibration_error
    # .9 and .92 share the bin (13/15, 14/15]: one of two right; .6 is in (8/15, 9/15] with 1/15 = .0667, wrong.
    found = ece(sure(0.9, 0.92, 0.6), np.array([0, 1, 1]))
    assert found == pytest.approx((2 * abs(0.5 - 0.91) + 0.6) / 3)
    # In one bin, errors of both signs cancel.
    assert ece(sure(0.9, 0.92, 0.6), np.array([0, 1, 0]), bins=1) == pytest.approx(abs(2 / 3 - 2.42 / 3))
    assert ece(sure(1.0, 1.0), np.array([0, 0])) == 0
    assert ece(sure(1.0, 1.0), np.array([1, 1])) == 1
    three = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    assert ece(three, np.array([1, 0])) == pytest.approx((0.5 + 0.8) / 2)


def test_bins_hold_their_upper_edge() -> None:
    # With two bins .5 belongs to the lower one: apart, the errors of .5 and .9 do not cancel.
    found = metrics.expected_calibration_error(sure(0.5, 0.9), np.array([0, 1]), bins=2)
    assert found == pytest.approx((0.5 + 0.9) / 2)


def test_fifteen_bins_are_the_default() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 400)
    labels = (rng.uniform(size=400) < 0.3).astype(int)
    right, wanted = labels == 0, 0.0
    for n in range(15):
        rows = (confidence > n / 15) & (confidence <= (n + 1) / 15)
        if rows.any():
            wanted += rows.mean() * abs(right[rows].mean() - confidence[rows].mean())
    assert metrics.expected_calibration_error(sure(*confidence), labels) == pytest.approx(wanted)


def test_what_cannot_be_calibrated() -> None:
    ece = metrics.expected_calibration_error
    assert np.isnan(ece(sure(0.5, np.nan), np.array([0, 1])))
    for probabilities, labels in ((np.ones(3), np.ones(3)), (sure(0.5), np.ones(2)), (np.ones((0, 2)), np.ones(0))):
        with pytest.raises(DataError, match=r"calibration needs \(rows, classes\) and \(rows,\)"):
            ece(probabilities, labels)
    for row in ([2.0, 1.0], [1.5, -0.5]):
        with pytest.raises(DataError, match=r"a row is no distribution \(got .* in row 1\)"):
            ece(np.array([[0.5, 0.5], row]), np.array([0, 1]))


# -- tasks ----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_classes_by_name(tmp_path: Path) -> None:
    task = tasks.TASKS["webnlg-category"]
    rows = [{"target": f"text {name}", "category": name} for name in ("Food", "Airport", "WrittenWork")]
    for split, extra in (("train", []), ("dev", []), ("test", [{"target": "x", "category": "Artist"}])):
        write(tmp_path / "WebNLG" / f"{split}.jsonl", rows + extra)
    splits = data.task_splits(task, tmp_path)
    assert [row["category"] for row in splits.train] == [5, 0, 9]
    assert splits.test is not None
    assert [row["category"] for row in splits.test] == [5, 0, 9]  # nobody could learn what an artist is
    assert splits.labels == task.classes
    assert len(set(task.classes)) == task.num_labels == 10
    write(tmp_path / "WebNLG" / "dev.jsonl", [{"target": "x", "category": "Artist"}])
    with pytest.raises(DataError, match=r"no such class \(got 'Artist' in .*dev, line 1\); the task knows Airport, "):
        data.task_splits(task, tmp_path)


def test_a_test_set_of_other_classes_only_is_none(tmp_path: Path) -> None:
    for split, name in (("train", "Food"), ("dev", "Food"), ("test", "Artist")):
        write(tmp_path / "WebNLG" / f"{split}.jsonl", [{"target": "x", "category": name}])
    assert data.task_splits(tasks.TASKS["webnlg-category"], tmp_path).test is None


def test_a_task_of_glue_comes_from_the_hub_where_no_folder_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert {name for name, task in tasks.TASKS.items() if task.hub == ("nyu-mll/glue", name)} == {
        *("mrpc", "rte", "stsb", "sst2", "cola", "qnli")
    }
    task = tasks.TASKS["qnli"]
    rows = [{"question": f"q {n}", "sentence": f"s {n}", "label": n % 2} for n in range(4)]
    for split in ("train", "validation"):
        write(tmp_path / "hub" / f"{split}.jsonl", rows)
    with pytest.raises(DataError, match=r"without 'QNLI'; it holds hub\).*or leave it out"):  # no folder of tasks
        data.task_splits(replace(task, hub=(str(tmp_path / "hub"), None)), tmp_path)
    (tmp_path / "RTE").mkdir()
    there = replace(task, hub=(str(tmp_path / "hub"), None))
    splits = data.task_splits(there, tmp_path)
    assert [row["label"] for row in splits.dev] == [0, 1, 0, 1]
    assert "has no folder QNLI: the task comes from" in caplog.text
    assert data.task_splits(there, None) == splits
    other = replace(there, fields=("sentence2", "sentence1"), hub_fields=("question", "sentence"))
    assert data.task_splits(other, None).dev[3] == {"sentence2": "q 3", "sentence1": "s 3", "label": 1, "__line__": 3}
    with pytest.raises(ConfigError, match=r"the task is in no library \(got 'e2e' without data\); give --data DIR"):
        data.task_splits(tasks.TASKS["e2e"], None)
    with pytest.raises(DataError, match=r"the data set cannot be loaded \(got 'no/such-set'"):
        data.task_splits(replace(task, hub=("no/such-set", None)), tmp_path)
    for split in ("train", "dev"):
        write(tmp_path / "QNLI" / f"{split}.jsonl", rows[:2])
    assert len(data.task_splits(task, tmp_path).train) == 2
