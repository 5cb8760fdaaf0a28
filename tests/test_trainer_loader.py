"""Our batches in the Trainer, in one process: which samples a step has, stores as data sets, resuming, padding rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import distributed_work as work
import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import DrawnMask
from hiddenkey_rs.loading.collator import Collator
from hiddenkey_rs.train import Loader
from hiddenkey_rs.train.fingerprint import data_parts, weights_digest
from hiddenkey_rs.train.loader import PaddedRows, Weightless
from hiddenkey_rs.train.resume import warn_about_generators
from hiddenkey_rs.train.sample_ids import PaddingId
from hiddenkey_rs.train.stream import Stream


def steps_of(run: hk.HiddenKeyTrainer, resume: Any = None) -> dict[int, list[int]]:
    """The samples of every step, as their masks say."""
    found: dict[int, list[int]] = {}

    def note(mask: DrawnMask) -> None:
        if mask.key.layer == 0 and mask.key.branch == 0 and mask.key.site == "ffn":
            found.setdefault(mask.key.step, []).extend(mask.samples.tolist())

    run.handle.record_masks(note)
    run.train(resume_from_checkpoint=resume)
    return {step: sorted(samples) for step, samples in found.items()}


def spec(out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "rows": 22, **more}


def planned(data: Any, steps: int, **sizes: Any) -> dict[int, list[int]]:
    sampler = hk.BatchSampler(data, seed=1, **sizes)
    found: list[list[int]] = []
    while len(found) < steps:
        found += [sorted(rows) for rows in sampler]
    return dict(enumerate(found[:steps]))


def test_a_store_just_works(tmp_path: Path) -> None:
    run = work.trainer(spec(tmp_path, loader="auto", arguments={"max_steps": 9}))
    found = steps_of(run)
    assert found == planned(run.train_dataset, 9, batch_size=4)
    for first in (0, 6):  # 22 rows in steps of 4: 6 steps an epoch, the last with 2 rows
        assert len(found[first]) == 4
    assert sorted(row for step in range(6) for row in found[step]) == list(range(22))
    assert [found[step] for step in range(3)] != [found[step] for step in range(6, 9)]


@pytest.mark.parametrize("arguments", [{"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2}])
def test_splits_and_workers_change_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    size = 4 // arguments.get("gradient_accumulation_steps", 1)
    run = work.trainer(spec(tmp_path, arguments={"max_steps": 7, "per_device_train_batch_size": size, **arguments}))
    assert steps_of(run) == planned(run.train_dataset, 7, batch_size=4)


def test_spans_need_whole_documents(tmp_path: Path) -> None:
    store = hk.TokenStore((np.arange(5, 25), np.array([0, 12, 20])))
    with pytest.raises(hk.ConfigError, match="too_long='split' cuts documents"):
        hk.HiddenKeyTrainer(
            model=families.build("llama"),
            args=tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            train_dataset=store.packed(8, too_long="split"),
            config="dropkey-span",
            stock_dropout="off",
        )


def test_choices_of_the_loader(tmp_path: Path) -> None:
    plain = work.rows("bert", 22)
    lengths = [len(row["input_ids"]) for row in plain]
    cases = [
        (Loader(batch_size=5), {}, {"batch_size": 5}),
        (Loader(token_budget=24), {}, {"token_budget": 24}),
        (Loader(window=8), {}, {"batch_size": 4, "window": 8}),
        (Loader(shuffle=False), {}, {"batch_size": 4, "shuffle": False}),
        (Loader(), {"train_sampling_strategy": "sequential"}, {"batch_size": 4, "shuffle": False}),
        (Loader(), {"dataloader_drop_last": True}, {"batch_size": 4, "tail": "drop"}),
        (Loader(tail="pad"), {"dataloader_drop_last": True}, {"batch_size": 4, "tail": "pad"}),
        (Loader(), {"data_seed": 1, "seed": 7}, {"batch_size": 4}),
    ]
    for loader, arguments, sizes in cases:
        run = work.trainer(spec(tmp_path, loader=loader, arguments={"max_steps": 6, **arguments}))
        assert steps_of(run) == planned(lengths, 6, **sizes), loader
    table = datasets.Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in plain])
    run = work.trainer(spec(tmp_path, loader="hiddenkey", data=table, store=False, arguments={"max_steps": 6}))
    assert steps_of(run) == planned(lengths, 6, batch_size=4), "the Trainer's column of lengths"
    run = work.trainer(spec(tmp_path, loader="hiddenkey", data=plain, store=False, arguments={"max_steps": 6}))
    assert steps_of(run) == planned(22, 6, batch_size=4), "nothing is known of lengths"


def test_sample_ids_of_a_list_win(tmp_path: Path) -> None:
    named = [{**row, "sample_id": 100 + n} for n, row in enumerate(work.rows("bert", 22))]
    run = work.trainer(spec(tmp_path, data=named, store=False, arguments={"max_steps": 6}))
    assert sorted(row for rows in steps_of(run).values() for row in rows) == list(range(100, 122))


def test_evaluation_reads_stores(tmp_path: Path) -> None:
    run = work.trainer(spec(tmp_path))
    data = work.rows("bert", 6, seed=8)
    found = run.evaluate(work.store(data))
    run.handle.detach()
    batch = Collator()(data)
    assert found["eval_loss"] == pytest.approx(float(run.model.eval()(**batch).loss), rel=1e-6)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    for kind, message, more in [
        (hk.ConfigError, r"unknown loader \(got 'hidenkey'\); did you mean 'hiddenkey'", {"loader": "hidenkey"}),
        (hk.ConfigError, r"chooses rows by number \(got Stream", {"data": work.Stream([]), "store": False}),
        (hk.ConfigError, "ignore_data_skip would train", {"arguments": {"ignore_data_skip": True}}),
        (hk.ConfigError, "auto_find_batch_size would change", {"arguments": {"auto_find_batch_size": True}}),
        (hk.DataError, r"beyond the vocabulary of 97 \(got 120", {"data": [{"input_ids": [5, 120], "labels": 0}]}),
    ]:
        with pytest.raises(kind, match=message):
            work.trainer(spec(tmp_path, **more))
    with pytest.raises(hk.ConfigError, match=r"in rows or in tokens \(got batch_size=4 and token_budget=9\)"):
        Loader(batch_size=4, token_budget=9)
    with pytest.raises(hk.DataError, match="longer than the token budget"):
        work.trainer(spec(tmp_path, loader=Loader(token_budget=3))).train()


SAVED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}


def test_resuming_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    for loader in (Loader(), Loader(token_budget=24)):
        out = tmp_path / str(loader.token_budget)
        whole = work.trainer(spec(out, loader=loader, arguments={**SAVED, "max_steps": 14}))
        expected = steps_of(whole)
        for step in (4, 8):  # within the first epoch, and past its end
            again = work.trainer(spec(out, loader=loader, arguments={**SAVED, "max_steps": 14, "save_strategy": "no"}))
            found = steps_of(again, str(out / f"checkpoint-{step}"))
            assert found == {number: rows for number, rows in expected.items() if number >= step}
            assert weights_digest(again.model) == weights_digest(whole.model)


def test_a_checkpoint_of_other_batches_is_refused(tmp_path: Path) -> None:
    run = work.trainer(spec(tmp_path, arguments=SAVED))
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    state = json.loads((checkpoint / "sampler_state.json").read_text())
    assert (state["steps"], state["sampler"]["epoch"], state["sampler"]["step"]) == (4, 0, 4)
    for message, more in [
        (
            r"trained on global batches of 4 rows \(got 2\); let per_device.* be 4, or",
            {"per_device_train_batch_size": 2},
        ),
        (r"got seed=1, not 2", {"seed": 2}),
        (r"got tail='pad', not 'drop'", {"dataloader_drop_last": True}),
    ]:
        with pytest.raises(hk.StateError, match=message):
            work.trainer(spec(tmp_path, arguments={**SAVED, **more})).train(str(checkpoint))
    for message, more in [
        (r"trained with loader='hiddenkey' \(got .*sampler_state.json\)", {"loader": "stock"}),
        (r"trained with another data \(got ", {"data": work.rows("bert", 22, seed=9)}),
        (r"another data set's size \(got 22 there and 23 here", {"rows": 23}),
        (r"got batch_size=4, not None", {"loader": Loader(token_budget=24)}),
    ]:
        with pytest.raises(hk.StateError, match=message):
            work.trainer(spec(tmp_path, **{"arguments": SAVED, **more})).train(str(checkpoint))
    for text, message in [
        (json.dumps({**state, "steps": 5}), "state is damaged .got 5 steps for step 4 of epoch 0"),
        (json.dumps({**state, "steps": -2}), "state is damaged"),
        ("{", "state cannot be read"),
        ("[]", "state cannot be read"),
        (None, "lacks state .* without sampler_state.json"),
    ]:
        (checkpoint / "sampler_state.json").unlink()
        if text is not None:
            (checkpoint / "sampler_state.json").write_text(text)
        else:
            (tmp_path / "checkpoint-8").rename(checkpoint.with_name("other"))
        with pytest.raises(hk.StateError, match=message):
            work.trainer(spec(tmp_path, arguments=SAVED)).train(str(checkpoint))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_is_all_epochs_one_after_the_other(data: Any) -> None:
    """From any number of steps that are behind, fresh or resumed, however the Trainer cuts it into epochs."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=40))
    budget = data.draw(st.booleans())
    sizes = {"token_budget": 20} if budget else {"batch_size": data.draw(st.integers(1, 12))}
    micro, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    sampler = hk.BatchSampler(lengths, accumulation=micro, seed=seed, **sizes)
    every = [list(rows) for _ in range(4) for rows in sampler]
    done = data.draw(st.integers(0, len(every) // micro // 2))
    stream = Stream(hk.BatchSampler(lengths, accumulation=micro, seed=seed, **sizes), lambda: done)
    assert len(stream) == stream.steps * micro
    assert [list(rows) for rows in stream] == every[done * micro : done * micro + len(stream)]
    stream._resumed = True  # the Trainer leaves out what the epoch has behind it, and asks for the rest
    behind = done % stream.steps * micro
    found = [list(rows) for rows in stream]
    assert len(found) == len(stream)
    assert found[behind:] == every[done * micro :][: len(stream) - behind]
    assert [list(rows) for rows in stream] == every[done * micro : done * micro + len(stream)], "only once"


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("gradient", ["one", "both"])
def test_a_padding_row_weighs_nothing(family: str, gradient: str) -> None:
    handle = hk.attach(families.build(family), work.BOTH if gradient == "both" else work.CONFIG, stock_dropout="off")
    batch = {name: value[:1] for name, value in families.batch(family).items()}
    passes = []
    handle.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    assert handle.count_items({**batch, "sample_id": torch.tensor([-1])}) == 0
    assert handle.count_items({**batch, "sample_id": torch.tensor([3])}) > 0
    for items in (None, 5, torch.tensor(0)):
        handle.model.zero_grad()
        with handle.step(0, [-1]):
            found = handle.compute(batch, items)
        found.loss.backward()
        assert (found.loss, found.task, found.consistency) == (0, 0, 0)
        grads = [p.grad for p in handle.model.parameters() if p.requires_grad]
        assert all(grad is not None and not grad.any() for grad in grads), "they all take part, with zero"
    assert passes == ([True] * 3 if gradient == "both" else [False, True] * 3), "as many passes as any other rank's"
    assert handle.counted() == {}
    with handle.step(0, [3]):
        handle.compute({**batch, "labels": families.batch(family)["labels"][:1]})
    assert handle.counted()


def test_padding_rows_of_any_data_set() -> None:
    data = PaddedRows(work.rows("bert", 3))
    assert len(data) == 3
    [padding] = data.__getitems__([-1])
    assert padding == {**data.dataset[0], "sample_id": -1}
    assert data.__getitems__([2, 0]) == [data.dataset[2], data.dataset[0]]
    for labels, nothing in ((1, -100), (0.5, 0.0), ([5, 6, 7], [-100] * 3)):
        row = {"input_ids": [5, 6, 7], "labels": labels}
        batch = Weightless(Collator())([{**row, "sample_id": PaddingId(-1)}])
        assert (batch["labels"].tolist(), batch["sample_id"].tolist()) == ([nothing], [-1])
        assert Weightless(Collator())([{**row, "sample_id": 0}])["labels"].tolist() == [labels]


def test_digests_of_data_and_weights() -> None:
    data = work.rows("bert", 100)
    digest = data_parts(data)["data"]
    assert data_parts([{k: np.array(v) for k, v in row.items()} for row in data])["data"] == digest
    assert data_parts([{**row, "labels": 1 - row["labels"]} for row in data])["data"] != digest
    assert data_parts(data[:99])["data set's size"] == "99"
    assert data_parts(work.store(data))["data"] == work.store(data).digest
    assert "data" not in data_parts(work.Stream(data))

    class Noise(list):
        def __getitem__(self, row: Any) -> Any:
            return {"input_ids": torch.rand(3)}

    assert data_parts(Noise(data)) == {"data set's size": "100"}, "examples that are made anew say nothing"
    model = torch.nn.Linear(3, 2)
    before = weights_digest(model)
    assert weights_digest(model) == before
    model.bias.requires_grad_(False)
    assert weights_digest(model) != before
    model.bias.requires_grad_(True)
    with torch.no_grad():
        model.weight[1, 2] += 1e-6
    assert weights_digest(model) != before
    assert weights_digest(model.to(torch.bfloat16)) != before


def test_torchs_own_dropout_on_other_ranks_is_spoken_of(tmp_path: Path) -> None:
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_generators(str(tmp_path), 2, model_draws=True)
        warn_about_generators(str(tmp_path), 1, model_draws=False)
    for now in (1, 3):
        with pytest.warns(UserWarning, match=rf"another number of ranks \(got {now} now\).*stock_dropout=\"off\""):
            warn_about_generators(str(tmp_path), now, model_draws=True)
    (tmp_path / "rng_state_1.pth").unlink()
    (tmp_path / "rng_state_0.pth").rename(tmp_path / "rng_state.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_generators(str(tmp_path), 1, model_draws=True)


def test_several_devices_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.TrainingArguments, "n_gpu", property(lambda self: 2))
    model = families.build("bert")
    arguments = tf.TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(hk.ConfigError, match=r"copies of the model.*got 2 devices\); start it with torchrun"):
        hk.HiddenKeyTrainer(model=model, args=arguments, config=hk.HiddenKeyConfig(), stock_dropout="off")
    assert model.config._attn_implementation == "sdpa", "nothing stays attached"


def llama_trainer(out: Path, train: Any, evaluated: Any = None, **more: Any) -> hk.HiddenKeyTrainer:
    arguments = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", **more.pop("arguments", {})}
    return hk.HiddenKeyTrainer(
        model=families.build("llama"),
        args=tf.TrainingArguments(str(out), **arguments),
        train_dataset=train,
        eval_dataset=evaluated,
        config="hiddenkey-minus",
        stock_dropout="off",
        **more,
    )


def words(seed: int) -> hk.TokenStore:
    offsets = np.array([0, 5, 12, 16, 25, 30, 40])
    ids = np.random.default_rng(seed).integers(5, 90, 40)
    return hk.TokenStore((ids, offsets), token_columns={"labels": ids})


def test_packed_for_training_and_plain_for_evaluation(tmp_path: Path) -> None:
    run = llama_trainer(
        tmp_path, words(0).packed(16), {"plain": words(1), "some": torch.utils.data.Subset(words(1), [0, 2])}
    )
    run.train()
    found = run.evaluate()
    run.handle.detach()
    for name, rows in (("plain", range(6)), ("some", [0, 2])):
        batch = Collator()([words(1)[row] for row in rows])
        assert found[f"eval_{name}_loss"] == pytest.approx(float(run.model.eval()(**batch).loss), rel=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluated_packed_documents_do_not_see_each_other(use_cache: bool, tmp_path: Path) -> None:
    run = llama_trainer(
        tmp_path,
        words(0).packed(16),
        words(1).packed(16),
        arguments={"use_cache": use_cache, "per_device_eval_batch_size": 1},
    )
    found = run.evaluate()["eval_loss"]
    run.handle.detach()
    rows, total = words(1).packed(16), 0.0
    for row in range(len(rows)):
        losses = []
        for sample in np.unique(rows[row]["sample_id"]):
            ids = torch.from_numpy(rows[row]["input_ids"][rows[row]["sample_id"] == sample])[None]
            losses += [float(run.model.eval()(input_ids=ids, labels=ids).loss)] * (ids.shape[1] - 1)
        total += sum(losses) / len(losses)
    assert found == pytest.approx(total / len(rows), rel=1e-5)


def test_collators_and_stores_that_do_not_go_together(tmp_path: Path) -> None:
    store, own = words(0), tf.DefaultDataCollator()
    with pytest.raises(
        hk.ConfigError, match=r"made by hiddenkey_rs.Collator \(got data_collator=DefaultDataCollator, which"
    ):
        llama_trainer(tmp_path, store, store.packed(16), data_collator=own)
    with pytest.raises(hk.DataError, match=r"a part of a store is no training set \(got Subset of TokenStore\)"):
        llama_trainer(tmp_path, torch.utils.data.Subset(store, [0, 1]))
    with pytest.raises(
        hk.ConfigError, match=r"goes with none of the stores \(got layout='packed'\); use layout='padded'"
    ):
        llama_trainer(tmp_path, store, data_collator=Collator(layout="packed"))
    with pytest.raises(
        hk.ConfigError, match=r"goes with none of the stores \(got layout='flat'\); use layout='packed'"
    ):
        llama_trainer(tmp_path, store.packed(16), data_collator=Collator(layout="flat"))
    examples = [{"input_ids": [5, 6], "labels": [5, 6]}]  # for these one's own collator is called
    llama_trainer(tmp_path, store, examples, data_collator=own).evaluate()
