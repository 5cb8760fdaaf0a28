"""How documents keep their numbers: through TRL's preparation and packing, and through collators; what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("trl", reason="the SFT trainer needs TRL")

import families
import hiddenkey_rs as hk
import sft_cases as cases
from hiddenkey_rs.train.sample_ids import SampleIdCollator
from hiddenkey_rs.train.sft_checks import check_parallelism
from hiddenkey_rs.train.sft_data import pack_documents


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    capacity=st.integers(1, 12),
    strategy=st.sampled_from(["bfd", "bfd_split", "wrapped"]),
    shuffled=st.booleans(),
    streamed=st.booleans(),
)
def test_packing_keeps_every_tokens_number_and_place(
    lengths: list[int], capacity: int, strategy: str, shuffled: bool, streamed: bool
) -> None:
    lengths = [max(length, 1) for length in lengths] if streamed else lengths  # datasets cannot stream an empty list
    documents = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    ids = [7 * number + 3 for number in range(len(lengths))]
    data: Any = datasets.Dataset.from_dict({"input_ids": documents, "labels": documents, "sample_id": ids})
    data = data.to_iterable_dataset() if streamed else data
    args = SimpleNamespace(
        max_length=capacity, packing_strategy=strategy, shuffle_dataset=shuffled, seed=0, dataset_num_proc=None
    )
    kept = []
    for row in pack_documents(data, args):
        assert 0 < len(row["input_ids"]) <= capacity
        assert len(row["input_ids"]) == len(row["sample_id"]) == len(row["sample_position"]) == len(row["labels"])
        for token, sample, place in zip(row["input_ids"], row["sample_id"], row["sample_position"], strict=True):
            assert documents[(sample - 3) // 7][place] == token
            kept.append(token)
    cut = capacity if strategy == "bfd" else None  # the only strategy that drops what is too long
    assert sorted(kept) == sorted(token for document in documents for token in document[:cut])


def batches(run: Any) -> list[dict[str, torch.Tensor]]:
    return list(run.get_train_dataloader())


@pytest.mark.parametrize("packing", [False, True])
def test_numbers_are_rows_of_what_was_given(packing: bool, tmp_path: Path) -> None:
    """TRL drops the examples whose completion was cut away, and shuffles: numbers still are those of the given rows."""
    prompts = [3, 30, 5, 30, 8, 2]
    data = datasets.Dataset.from_dict(
        {
            "prompt": [cases.sentence(n, length) + " " for n, length in enumerate(prompts)],
            "completion": [cases.sentence(50 + n, 4) for n in range(6)],
        }
    )
    how = {"shuffle_dataset": True, "packing": packing, "per_device_train_batch_size": 2, "max_length": 24}
    words = [cases.tokenizer()(row["prompt"] + row["completion"])["input_ids"] for row in data]
    found = set()
    for batch in batches(cases.trainer(tmp_path, data, **how)):
        assert batch["sample_id"].dim() == 1 + packing
        for row in range(len(batch["input_ids"])):
            ids = batch["sample_id"][row].expand(batch["input_ids"].shape[1])
            for number in set(ids.tolist()) - {-1}:
                tokens = batch["input_ids"][row][ids == number]
                expected = [*words[number], 2][:24]
                assert tokens[: len(expected)].tolist() == expected
                found.add(number)
    assert found == ({0, 1, 2, 3, 4, 5} if packing else {0, 2, 4, 5})


@pytest.mark.parametrize("unused", [True, False])
@pytest.mark.parametrize("packing", [False, True])
def test_a_column_of_numbers_wins_and_is_not_stripped(unused: bool, packing: bool, tmp_path: Path) -> None:
    data = cases.texts().add_column("sample_id", [1000 + 7 * n for n in range(12)])
    run = cases.trainer(tmp_path, data, packing=packing, remove_unused_columns=unused)
    found = {number for batch in batches(run) for number in batch["sample_id"].flatten().tolist()}
    assert found - {-1} == {1000 + 7 * n for n in range(12)}


@pytest.mark.parametrize("packing", [False, True])
def test_streams_bring_their_numbers(packing: bool, tmp_path: Path) -> None:
    how = {"packing": packing, "per_device_train_batch_size": 2}
    data = cases.texts().add_column("sample_id", range(5, 17))
    masks = []
    for source in (data, data.to_iterable_dataset()):
        run = cases.trainer(tmp_path, source, train_sampling_strategy="sequential", **how)
        masks.append(cases.Masks(run))
        run.train()
    assert cases.same(*masks)
    with pytest.raises(hk.DataError, match=r"have no numbers \(got columns text\); give it a 'sample_id' column"):
        cases.trainer(tmp_path, cases.texts().to_iterable_dataset(), **how)


def test_a_data_set_that_trl_leaves_alone(tmp_path: Path) -> None:
    tokens = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    run = cases.trainer(tmp_path, data, dataset_kwargs={"skip_prepare_dataset": True})
    assert sorted(batches(run)[0]["sample_id"].tolist()) == [0, 1, 2]
    rows = {
        "input_ids": [[5, 6, 7, 8], [9, 10]],
        "labels": [[5, 6, 7, 8], [9, 10]],
        "sample_id": [[4, 4, 4, 9], [2, 2]],
        "seq_lengths": [[3, 1], [2]],
    }
    packed = datasets.Dataset.from_dict(rows)
    run = cases.trainer(tmp_path, packed, padding_free=True, max_length=None, train_sampling_strategy="sequential")
    (batch,) = batches(run)
    assert batch["sample_id"].tolist() == [[4, 4, 4, 9, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    with pytest.raises(hk.DataError, match=r"are packed already \(got packing=True\)"):
        cases.trainer(tmp_path, packed, packing=True)
    with pytest.raises(hk.ConfigError, match=r"their documents have no numbers \(got the column 'seq_lengths'\)"):
        cases.trainer(tmp_path, packed.remove_columns("sample_id"))


class Lora:
    is_prompt_learning = True


SPAN = hk.HiddenKeyConfig(hidden=hk.HiddenDrop(pattern="span"))
PAIRS = hk.HiddenKeyConfig(attention=hk.AttentionDrop(pattern="element"))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"use_liger_kernel": True}, hk.ConfigError, r"Liger .*got use_liger_kernel=True\); set it to False"),
        ({"loss_type": "dft"}, hk.ConfigError, r"got loss_type='dft'\); use loss_type='nll'"),
        ({"peft_config": Lora()}, hk.ConfigError, r"belong to no example \(got Lora\); use an adapter"),
        ({"packing": True, "max_length": None}, hk.ConfigError, r"got max_length=None\); set max_length"),
        (
            {"config": SPAN, "packing": True, "packing_strategy": "bfd_split"},
            hk.ConfigError,
            r"strategy='bfd_split' cuts documents \(got hidden pattern 'span'\); use packing_strategy='bfd'",
        ),
        (
            {"config": PAIRS, "packing": True, "packing_strategy": "wrapped"},
            hk.ConfigError,
            r"two documents have no mask \(got attention pattern 'element'\); use packing_strategy='bfd'",
        ),
        (
            {"config": "hiddencut-span", "packing": True, "packing_strategy": "wrapped"},
            hk.ConfigError,
            r"strategy='wrapped' cuts documents \(got hidden pattern 'span'\)",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(how: Any, error: Any, message: str, tmp_path: Path) -> None:
    model = cases.build()
    with pytest.raises(error, match=message):
        cases.trainer(tmp_path, cases.texts(), model, **how)
    hk.attach(model)  # a refusal leaves nothing behind


def test_patterns_that_fit_their_packing_are_not_refused(tmp_path: Path) -> None:
    for config, strategy in ((SPAN, "bfd"), (PAIRS, "bfd_split"), ("hiddenkey", "wrapped")):
        cases.trainer(tmp_path, cases.texts(), config=config, packing=True, packing_strategy=strategy)
    still = hk.HiddenKeyConfig(attention=None, hidden=hk.HiddenDrop(pattern="span", rate=0.0), consistency=None)
    cases.trainer(tmp_path, cases.texts(), config=still, packing=True, packing_strategy="wrapped")
    named = hk.HiddenKeyConfig(attention=None, hidden=still.hidden, rate_pattern={"mlp": 0.1}, consistency=None)
    with pytest.raises(hk.ConfigError, match="hidden pattern 'span'"):
        cases.trainer(tmp_path, cases.texts(), config=named, packing=True, packing_strategy="wrapped")


def test_data_sets_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hk.ConfigError, match=r"got a training set with the column 'images'\); use TRL's"):
        cases.trainer(tmp_path, cases.texts().add_column("images", [0] * 12))
    with pytest.raises(
        hk.ConfigError, match=r"got TokenStore\); give one, or train a token store with HiddenKeyTrainer"
    ):
        cases.trainer(tmp_path, hk.TokenStore((np.arange(5), np.array([0, 5]))))
    with pytest.raises(hk.DataError, match=r"must be a column of integers \(got string\)"):
        cases.trainer(tmp_path, cases.texts().add_column("sample_id", ["a"] * 12))
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "vocab_size": 97}
    other = tf.GPTJForCausalLM(tf.GPTJConfig(**shape))
    with pytest.raises(hk.UnsupportedModelError, match="model_type 'gptj'"):
        cases.trainer(tmp_path, cases.texts(), other)


@pytest.mark.parametrize(("name", "word"), [("cp_enabled", "context"), ("sp_enabled", "sequence")])
def test_rows_spread_over_devices_are_refused(name: str, word: str) -> None:
    check_parallelism(None)
    check_parallelism(SimpleNamespace(cp_enabled=False, sp_enabled=False))
    with pytest.raises(hk.ConfigError, match=rf"got {word} parallelism\); spread rows"):
        check_parallelism(SimpleNamespace(**{name: True}))


@pytest.mark.parametrize("family", ["opt", "gpt_oss"])
def test_models_that_do_not_heed_positions_are_not_packed(family: str, tmp_path: Path) -> None:
    """Transformers would let a row's documents see each other in these."""
    cases.trainer(tmp_path, cases.texts(), family=family, max_steps=1).train()
    run = cases.trainer(tmp_path, cases.texts(), family=family, packing=True)
    with pytest.raises(hk.DataError, match=r"would attend to each other \(got model\..*do not pack for this model"):
        run.train()


def test_collators_that_flatten_and_numbers_by_token() -> None:
    """``sample_id`` of shape (B, L) for any collator: by feature or by token, padded on either side."""
    flat = SampleIdCollator(tf.DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    features = [{"input_ids": [5, 6, 7], "sample_id": 4}, {"input_ids": [8], "sample_id": 9}]
    assert flat(features)["sample_id"].tolist() == [[4, 4, 4, 9]]
    assert "sample_position" not in flat(features)
    twice = flat([features[0], {**features[1], "sample_id": 4}])  # an example that was drawn again, beside itself
    assert twice["sample_id"].tolist() == [[4, 4, 4, 4]]
    assert twice["sample_position"].tolist() == [[0, 1, 2, 0]]
    bare = SampleIdCollator(tf.DataCollatorWithFlattening(), required=False)
    assert "sample_id" not in bare([{"input_ids": [5]}, {"input_ids": [6]}])
    text = SampleIdCollator(tf.default_data_collator, required=False)
    assert set(text([{"input_ids": [5], "sample_id": "a-17"}])) == {"input_ids"}

    def padded(side: str) -> Any:
        def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            assert all(set(feature) == {"input_ids"} for feature in features)
            return dict(cases.tokenizer().pad(features, padding_side=side, return_tensors="pt"))

        return SampleIdCollator(collate)

    named = [
        {"input_ids": [5, 6, 7], "sample_id": [1, 1, 3], "sample_position": [4, 5, 0]},
        {"input_ids": [8], "sample_id": [3], "sample_position": [1]},
    ]
    assert bare(named)["sample_id"].tolist() == [[1, 1, 3, 3]]
    right, left = padded("right")(named), padded("left")(named)
    assert right["sample_id"].tolist() == [[1, 1, 3], [3, -1, -1]]
    assert right["sample_position"].tolist() == [[4, 5, 0], [1, -1, -1]]
    assert left["sample_id"].tolist() == [[1, 1, 3], [-1, -1, 3]]
    assert padded("left")(features)["sample_id"].tolist() == [4, 9]
    cut = SampleIdCollator(lambda features: {"input_ids": torch.ones(2, 2), "attention_mask": torch.ones(2, 2)})
    with pytest.raises(hk.DataError, match=r"got rows of \[2, 2\] tokens, and \[3, 1\]\)"):
        cut(named)
    short = SampleIdCollator(lambda features: {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)})
    with pytest.raises(hk.DataError, match=r"got rows of \[2\] tokens, and \[4\]\); do not truncate in the collator"):
        short(named)


def test_packed_rows_in_the_plain_trainer(tmp_path: Path) -> None:
    """One id a token through ``HiddenKeyTrainer``: masks and losses of the rows unpacked, with a cache asked for or not."""
    documents = [row["input_ids"] for row in cases.trainer(tmp_path, cases.texts()).train_dataset]
    plain = [{"input_ids": tokens, "labels": tokens} for tokens in documents]
    loose = tf.DataCollatorForSeq2Seq(cases.tokenizer(), label_pad_token_id=-100)
    found = []
    for collator in (loose, tf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        args = tf.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=12,
            max_steps=1,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            use_cache=True,
        )
        run = hk.HiddenKeyTrainer(
            model=cases.build(),
            args=args,
            train_dataset=plain,
            data_collator=collator,
            config=cases.CONFIG,
            stock_dropout="off",
        )
        masks = cases.Masks(run)
        run.train()
        found.append((masks, cases.logged(run)))
    assert cases.same(found[0][0], found[1][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_rows_with_an_id_a_token_are_evaluated_too(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids, "sample_id": [n] * len(ids)} for n, ids in enumerate(([5, 6, 7], [8, 9]))]
    bare = [{name: value for name, value in row.items() if name != "sample_id"} for row in rows]
    run = hk.HiddenKeyTrainer(
        model=cases.build(),
        args=tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=rows,
        eval_dataset={"rows": rows, "bare": bare},
        data_collator=tf.DataCollatorForSeq2Seq(cases.tokenizer(), label_pad_token_id=-100),
        config=cases.CONFIG,
        stock_dropout="off",
    )
    found = run.evaluate()
    assert found["eval_rows_loss"] == found["eval_bare_loss"]
    assert run.predict(rows).metrics["test_loss"] == found["eval_rows_loss"]


def test_an_encoders_rows_are_not_packed_without_a_mask_of_ones_own(tmp_path: Path) -> None:
    """Encoders ignore ``position_ids``: the documents of a row would see each other."""
    model = families.build("bert")
    handle = hk.attach(model, cases.CONFIG, stock_dropout="off")
    row, ids = torch.randint(5, 90, (1, 8)), torch.tensor([[1] * 4 + [2] * 4])
    apart = (ids[:, :, None] == ids[:, None, :])[:, None]
    batch = {"input_ids": row, "labels": torch.tensor([1])}
    for mask in (torch.ones_like(row), None, torch.ones(1, 1, 8, 8, dtype=torch.bool)):
        with handle.step(0, ids), pytest.raises(hk.DataError, match="would attend to each other"):
            handle.loss(**batch, attention_mask=mask)
    with handle.step(0, ids):
        assert torch.isfinite(handle.loss(**batch, attention_mask=apart))
