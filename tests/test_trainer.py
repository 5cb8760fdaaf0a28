"""The Trainer: sample ids survive it, accumulation and checkpointing change nothing, resume is exact, logs and side-car."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf
from torch.utils.data import Dataset, IterableDataset

import families
import hiddenkey_rs as hk

CONFIG = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), layers="all")


def rows(family: str, count: int = 12) -> list[dict[str, torch.Tensor]]:
    batch = families.batch(family, rows=3)
    return [{name: value[n % 3] for name, value in batch.items()} for n in range(count)]


class Rows(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> Any:
        return self.items[n]


class Stream(IterableDataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


def trainer(
    out: Path, data: Any, model: Any = None, config: Any = CONFIG, family: str = "bert", **arguments: Any
) -> hk.HiddenKeyTrainer:
    extra = {
        name: arguments.pop(name)
        for name in ("data_collator", "compute_loss_func", "eval_dataset", "compute_metrics")
        if name in arguments
    }
    defaults = {
        "per_device_train_batch_size": 6,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
    }
    args = tf.TrainingArguments(str(out), **{**defaults, **arguments})
    model = families.build(family) if model is None else model
    return hk.HiddenKeyTrainer(model=model, args=args, train_dataset=data, config=config, stock_dropout="off", **extra)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_accumulation_changes_nothing_but_rounding(family: str, tmp_path: Path) -> None:
    results = []
    for accumulation, size in ((1, 6), (2, 3), (3, 2), (6, 1)):
        run = trainer(
            tmp_path,
            rows(family),
            family=family,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
            optim="sgd",
            max_grad_norm=0.0,
        )
        run.train()
        results.append((weights(run.model), [entry["loss"] for entry in run.state.log_history if "loss" in entry]))
    for parameters, logged in results[1:]:
        # Weights of T5's embedding reach 4, where one unit in the last place of float32 is 4.8e-7.
        assert furthest(parameters, results[0][0]) < 1e-6
        assert logged == pytest.approx(results[0][1], abs=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    plain = trainer(tmp_path, rows("bert"))
    plain.train()
    again = trainer(
        tmp_path, rows("bert"), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    again.model.enable_input_require_grads()
    again.train()
    assert furthest(weights(plain.model), weights(again.model)) == 0.0


def seen_ids(run: hk.HiddenKeyTrainer) -> list[int]:
    found: list[int] = []
    run.handle.record_masks(
        lambda mask: (
            found.extend(mask.samples.tolist())
            if mask.key.layer == 0 and mask.key.branch == 0 and mask.key.site == "ffn"
            else None
        )
    )
    run.train()
    return found


def test_ids_are_rows_of_the_training_set_whatever_its_type(tmp_path: Path) -> None:
    plain = [{name: value.tolist() for name, value in row.items()} for row in rows("bert")]
    expected = None
    for data in (plain, Rows(plain), datasets.Dataset.from_list([{**row, "unused": "x"} for row in plain])):
        found = seen_ids(trainer(tmp_path, data, max_steps=2))
        assert sorted(found) == list(range(12))
        expected = expected or found
        assert found == expected


def test_a_sample_id_column_wins_and_survives_every_collator(tmp_path: Path) -> None:
    named = [{**row, "sample_id": 1000 + 7 * n} for n, row in enumerate(rows("bert"))]
    expected = [1000 + 7 * n for n in range(12)]
    for data in (
        named,
        datasets.Dataset.from_list(
            [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in named]
        ),
    ):
        assert sorted(seen_ids(trainer(tmp_path, data, max_steps=2))) == expected
    assert seen_ids(trainer(tmp_path, Stream(named), max_steps=2)) == expected

    def collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all("sample_id" not in feature for feature in features)
        return {name: torch.stack([torch.as_tensor(f[name]) for f in features]) for name in features[0]}

    assert sorted(seen_ids(trainer(tmp_path, named, max_steps=2, data_collator=collator))) == expected


def test_an_iterable_without_ids_and_examples_that_are_no_mappings(tmp_path: Path) -> None:
    with pytest.raises(hk.DataError, match=r"no sample id \(got fields input_ids.*'sample_id' column"):
        trainer(tmp_path, Stream(rows("bert"))).train()
    with pytest.raises(hk.DataError, match=r"must be mappings .*got tuple"):
        trainer(tmp_path, Rows([(1, 2)]))


def test_resume_is_exact(tmp_path: Path) -> None:
    arguments = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole = trainer(tmp_path / "a", rows("bert"), **arguments)
    whole.train()
    parts = trainer(tmp_path / "b", rows("bert"), **arguments)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    parts.train(resume_from_checkpoint=True)
    assert furthest(weights(whole.model), weights(parts.model)) == 0.0
    names = ("loss", "task_loss", "consistency_loss", "realised_rate_attention")
    logs = [
        [[e[n] for n in names] for e in t.state.log_history if e.get("step", 0) > 2 and "loss" in e]
        for t in (whole, parts)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    renamed = trainer(tmp_path / "c", rows("bert"), **arguments)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "c" / "best")
    renamed.train(resume_from_checkpoint=str(tmp_path / "c" / "best"))
    assert [e["task_loss"] for e in renamed.state.log_history if e.get("step", 0) > 2 and "loss" in e] == [
        entry[1] for entry in logs[0]
    ]


def test_a_checkpoint_that_a_kill_left_torn_is_passed_over(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, rows("bert"), max_steps=4, **saved)
    whole.train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text("")
    with pytest.warns(UserWarning, match=r"without a whole trainer_state.json\); going on from checkpoint-2"):
        trainer(tmp_path, rows("bert"), max_steps=2).train(resume_from_checkpoint=True)
    state.unlink()
    again = trainer(tmp_path, rows("bert"), max_steps=4, **saved)
    with pytest.warns(UserWarning, match=r"checkpoint-4' without trainer_state.json\); going on from checkpoint-2"):
        again.train(resume_from_checkpoint=True)
    assert furthest(weights(whole.model), weights(again.model)) == 0.0


def test_training_again_logs_again(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows("bert"), max_steps=2)
    run.train()
    run.train()
    assert [("task_loss" in e, e["step"]) for e in run.state.log_history if "loss" in e] == [(True, 1), (True, 2)]


def test_a_resume_that_would_train_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hk.StateError, match="there is no checkpoint to resume from"):
        trainer(tmp_path / "none", rows("bert")).train(resume_from_checkpoint=True)
    run = trainer(tmp_path, rows("bert"), save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert hk.HiddenKeyConfig.from_pretrained(checkpoint) == CONFIG
    other = trainer(tmp_path, rows("bert"), config="hiddenkey-minus")
    with pytest.raises(hk.StateError, match=r"trained with another config \(got attention="):
        other.train(resume_from_checkpoint=str(checkpoint))
    for name in ("optimizer.pt", "rng_state.pth", "hiddenkey_config.json"):
        (checkpoint / name).unlink()
        with pytest.raises(hk.StateError, match=name):
            trainer(tmp_path, rows("bert")).train(resume_from_checkpoint=str(checkpoint))


def test_logs_and_evaluation(tmp_path: Path) -> None:
    data = rows("bert")
    run = trainer(
        tmp_path,
        data,
        eval_dataset=[{**row, "sample_id": n} for n, row in enumerate(data[:3])],
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        compute_metrics=lambda p: {"rows": len(p.predictions)},
    )
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["consistency_loss"], abs=1e-5)
        assert 0.2 < entry["realised_rate_attention"] < 0.4
        assert 0.25 < entry["realised_rate_ffn"] < 0.35
    evaluated = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [entry["eval_rows"] for entry in evaluated] == [3, 3]
    run.handle.detach()
    run.model.eval()
    stock = run.model(**{name: torch.stack([row[name] for row in data[:3]]) for name in data[0]}).loss
    assert evaluated[-1]["eval_loss"] == pytest.approx(float(stock), rel=1e-6)


def test_label_smoothing_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    smooth = trainer(tmp_path, rows("bert"), label_smoothing_factor=0.2, config="none", max_steps=1)
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}
    logits = torch.tensor([[4.0, -2.0], [-1.0, 3.0], [2.0, 1.0]])
    of_rows = smooth._task_loss(labelled=True)(
        tf.modeling_outputs.SequenceClassifierOutput(logits=logits), batch["labels"]
    )
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    assert float(of_rows) == pytest.approx(float(expected))
    smooth.train()
    assert smooth.state.log_history[0]["loss"] == pytest.approx(0.69, abs=0.02)
    own = trainer(
        tmp_path,
        rows("bert"),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean() + 3,
        config="none",
        max_steps=1,
    )
    own.train()
    assert own.state.log_history[0]["loss"] == pytest.approx(3.0, abs=0.2)


def test_bfloat16_and_r_drop(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows("bert"), bf16=True, max_steps=2)
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    args = tf.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1
    )
    published = hk.HiddenKeyTrainer(
        model=families.build("bert"), args=args, train_dataset=rows("bert"), config="r-drop"
    )
    published.train()
    assert published.state.log_history[0]["consistency_loss"] > 0


def test_the_adapter_carries_the_side_car(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    run = trainer(tmp_path, rows("bert"), model=peft.get_peft_model(families.build("bert"), lora), max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "hiddenkey_config.json"} <= names
    assert "hiddenkey" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads((tmp_path / "adapter" / "hiddenkey_config.json").read_text())["stream"] == "hk1"


def test_a_fresh_model_for_each_trial(tmp_path: Path) -> None:
    args = tf.TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    run = hk.HiddenKeyTrainer(
        model_init=lambda: families.build("bert"),
        args=args,
        train_dataset=rows("bert"),
        config=CONFIG,
        stock_dropout="off",
    )
    first = run.handle
    run.train()
    assert run.handle is not first
    assert run.handle.base is run.model


def test_the_mixin_goes_in_front_of_other_trainers(tmp_path: Path) -> None:
    class Mine(hk.HiddenKeyTrainerMixin, tf.Seq2SeqTrainer):
        pass

    args = tf.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1
    )
    run = Mine(model=families.build("t5"), args=args, train_dataset=rows("t5"), config=CONFIG, stock_dropout="off")
    run.train()
    assert {"realised_rate_cross-attention", "realised_rate_decoder-attention"} <= run.state.log_history[0].keys()


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    class Weighted(tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    class Mine(hk.HiddenKeyTrainerMixin, Weighted):
        pass

    class Scaled(hk.HiddenKeyTrainer):  # in front, where it has both passes' loss in its hands
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    given = {"args": tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), "train_dataset": rows("bert")}
    message = r"would not use the loss of Weighted \(got Mine, .*give that loss as compute_loss_func="
    with pytest.raises(hk.ConfigError, match=message):
        Mine(model=families.build("bert"), **given)
    Scaled(model=families.build("bert"), stock_dropout="off", **given)


def test_question_answering(tmp_path: Path) -> None:
    config_name, _, arguments = families.FAMILIES["bert"]
    places = {"start_positions": torch.tensor([1, 99, 2]), "end_positions": torch.tensor([4, 99, 2])}  # one cut off
    batch = {name: value for name, value in families.batch("bert").items() if name != "labels"} | places
    data = [{name: value[n % 3] for name, value in batch.items()} for n in range(12)]
    found = []
    for size, steps in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        model = tf.BertForQuestionAnswering(getattr(tf, config_name)(vocab_size=97, **arguments)).train()
        run = trainer(
            tmp_path / str(size),
            data,
            model,
            eval_dataset=data[:3],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
        )
        run.train()
        logs = [(entry["task_loss"], entry["consistency_loss"]) for entry in run.state.log_history if "loss" in entry]
        assert run.evaluate()["eval_loss"] > 0
        found.append((weights(model), logs))
    assert furthest(found[0][0], found[1][0]) < 1e-6
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-9)


def test_who_computes_attention_is_a_choice_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(hk.ConfigError, match=r"unknown impl \(got 'fast'\)"):
        hk.HiddenKeyTrainer(model=families.build("bert"), impl="fast")
    arguments = tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    run = hk.HiddenKeyTrainer(
        model=families.build("bert"), args=arguments, train_dataset=rows("bert"), impl="reference"
    )
    assert run.handle.impl == "reference"
