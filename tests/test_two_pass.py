"""The loss of a step: what each compensation runs, what carries gradient, and what normalises it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import families
import hiddenkey_rs as hk
from hiddenkey_rs import losses
from hiddenkey_rs.attachment import compared

IDS = np.array([3, 9, 27])


def config(consistency: hk.Consistency | None, **parts: object) -> hk.HiddenKeyConfig:
    rates = {"attention": hk.AttentionDrop(rate=0.3), "hidden": hk.HiddenDrop(rate=0.3), "layers": "all"}
    return hk.HiddenKeyConfig(**{**rates, "consistency": consistency, **parts})


def attached(
    family: str, consistency: hk.Consistency | None, changes: dict | None = None, **parts: object
) -> hk.Handle:
    return hk.attach(families.build(family, **(changes or {})), config(consistency, **parts), stock_dropout="off")


def branch(handle: hk.Handle, number: int, batch: dict) -> torch.Tensor:
    """Logits of one branch, drawn by hand."""
    with handle.step(5, IDS), handle.session.branches((number,), force=True):
        return handle.model(**batch)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "t5"])
def test_kl_is_the_divergence_of_the_two_branches(family: str) -> None:
    handle = attached(family, hk.Consistency("kl", weight=0.7))
    batch = families.batch(family)
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    assert not torch.equal(first.logits, second.logits)
    rows = [first.logits, second.logits]
    if family in ("llama", "t5"):
        rows = [losses.token_rows(x, batch["labels"], shift=family == "llama") for x in rows]
    expected = first.loss + 0.7 * losses.kl(*rows).mean()
    with handle.step(5, IDS):
        loss = handle.loss(**batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(handle.last.consistency, losses.kl(*rows).mean().detach())
    torch.testing.assert_close(handle.last.task, first.loss.detach())


def test_the_gradient_runs_through_one_branch() -> None:
    handle = attached("bert", hk.Consistency("kl", weight=50.0))
    batch = families.batch("bert")
    with handle.step(5, IDS):
        handle.loss(**batch).backward()
    got = {n: p.grad.clone() for n, p in handle.model.named_parameters() if p.grad is not None}
    handle.model.zero_grad()
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    (first.loss + 50 * losses.kl(first.logits, second.logits.detach()).mean()).backward()
    for name, p in handle.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, msg=name)


def test_both_branches_are_one_doubled_batch_with_the_mean_task_loss() -> None:
    handle = attached("bert", hk.Consistency("kl", gradient="both"))
    batch = families.batch("bert")
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    expected = (first.loss + second.loss) / 2 + losses.kl(first.logits, second.logits).mean()
    with handle.step(5, IDS):
        loss = handle.loss(**batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    got = handle.model.classifier.weight.grad.clone()
    handle.model.zero_grad()
    expected.backward()
    torch.testing.assert_close(got, handle.model.classifier.weight.grad)


def test_js_compares_with_the_pass_without_any_dropout() -> None:
    handle = hk.attach(families.build("bert"), config(hk.Consistency("js")))  # the model's own dropout stays on
    batch = families.batch("bert")
    modes = [m.training for m in handle.model.modules()]
    torch.manual_seed(0)
    with handle.step(5, IDS):
        loss = handle.loss(**batch)
    assert [m.training for m in handle.model.modules()] == modes
    undropped = handle.model.eval()(**batch).logits.detach()
    handle.model.train()
    torch.manual_seed(0)
    first = branch(handle, 0, batch)
    torch.testing.assert_close(loss, first.loss + losses.js(first.logits, undropped).mean())


def test_jensen_shannon_and_no_consistency() -> None:
    batch = families.batch("bert")
    handle = attached("bert", hk.Consistency("jensen-shannon"))
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    with handle.step(5, IDS):
        torch.testing.assert_close(
            handle.loss(**batch), first.loss + losses.jensen_shannon(first.logits, second.logits).mean()
        )
    handle.detach()
    handle = attached("bert", None)
    with handle.step(5, IDS):
        torch.testing.assert_close(handle.loss(**batch), first.loss)
    assert handle.last.consistency is None


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "bart", "eurobert"])
def test_regression_compares_pooled_representations(family: str) -> None:
    import transformers as tf

    model_class = {"llama": "LlamaForSequenceClassification", "bart": "BartForSequenceClassification"}
    config_name, name, arguments = families.FAMILIES[family]
    arguments = {**arguments, "pad_token_id": 1}  # what the batch is padded with
    shape = getattr(tf, config_name)(vocab_size=97, num_labels=1, problem_type="regression", **arguments)
    torch.manual_seed(0)
    model = getattr(tf, model_class.get(family, name))(shape).train()
    handle = hk.attach(model, config(hk.Consistency("kl")), stock_dropout="off")
    batch = families.batch("bert")
    batch["labels"] = torch.tensor([0.5, 1.5, 2.5])
    if family == "bart":
        batch["input_ids"][:, 3] = 2  # one end-of-sequence token a row, which its head reads
    head_inputs: list[torch.Tensor] = []
    head = (
        model.score if family == "llama" else getattr(model, "classification_head", getattr(model, "classifier", None))
    )
    head.register_forward_hook(lambda module, args, output: head_inputs.append(args[0]))
    for number in (0, 1):
        branch(handle, number, batch)
    pooled = []
    for hidden in head_inputs:
        if family == "llama":
            hidden = hidden[torch.arange(3), batch["attention_mask"].sum(1) - 1]
        if family == "eurobert":
            hidden = torch.stack(
                [row[real.bool()].mean(0) for row, real in zip(hidden, batch["attention_mask"], strict=True)]
            )
        pooled.append(hidden[:, 0] if hidden.dim() == 3 else hidden)
    with handle.step(5, IDS):
        handle.loss(**batch)
    torch.testing.assert_close(handle.last.consistency, losses.kl(*pooled).mean().detach())
    if family == "llama":  # without a mask the head still tells padding by its id
        hidden, last = head_inputs[0], batch["attention_mask"].sum(1) - 1
        unmasked = {"input_ids": batch["input_ids"]}
        assert torch.equal(compared._pooled(handle, unmasked, hidden), hidden[torch.arange(3), last])
        model.config.pad_token_id = None
        assert torch.equal(compared._pooled(handle, unmasked, hidden), hidden[:, -1])


def answering(family: str, part: hk.Consistency | None, mask: bool = True) -> tuple[hk.Handle, dict[str, torch.Tensor]]:
    import transformers as tf

    config_name, _, arguments = families.FAMILIES[family]
    name = {"bert": "Bert", "llama": "Llama", "bart": "Bart"}[family] + "ForQuestionAnswering"
    torch.manual_seed(0)
    model = getattr(tf, name)(getattr(tf, config_name)(vocab_size=97, **arguments)).train()
    batch = families.batch("bert")
    del batch["labels"]
    batch |= {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([4, 3, 2])}
    if family == "bart" and mask:
        batch["decoder_attention_mask"] = batch["attention_mask"]
    whole = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), consistency=part, layers="all")
    return hk.attach(model, whole, stock_dropout="off"), batch


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_question_answering_compares_starts_and_ends(family: str) -> None:
    handle, batch = answering(family, hk.Consistency("kl"))
    real = batch["attention_mask"].bool()
    passes = [branch(handle, number, batch) for number in (0, 1)]
    expected = []
    for row in range(3):
        starts, ends = ([p[f"{side}_logits"][row, real[row]][None] for p in passes] for side in ("start", "end"))
        expected.append((losses.kl(*starts) + losses.kl(*ends)) / 2)
    with handle.step(5, IDS):
        result = handle.compute(batch)
        assert int(handle.count_items(batch)) == 6, "starts and ends"
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        with handle.step(5, IDS[rows]):
            parts.append(handle.compute({name: value[rows] for name, value in batch.items()}, num_items=6).loss)
    torch.testing.assert_close(sum(parts), result.loss)
    torch.testing.assert_close(result.task, passes[0].loss.detach())
    torch.testing.assert_close(result.consistency, torch.cat(expected).mean().detach())
    result.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in handle.model.parameters() if p.grad is not None)
    both, batch = answering(family, hk.Consistency("kl", gradient="both"))
    with both.step(5, IDS):
        doubled = both.compute(batch)
    torch.testing.assert_close(doubled.consistency, result.consistency)


def test_answers_that_were_cut_off_carry_no_loss() -> None:
    handle, batch = answering("bert", hk.Consistency("kl"))
    batch["start_positions"][1] = batch["end_positions"][1] = 99
    stock = branch(handle, 0, batch).loss
    with handle.step(5, IDS):
        result = handle.compute(batch)
    torch.testing.assert_close(result.task, stock.detach())
    parts = []
    for rows in (slice(0, 2), slice(2, 3)):
        with handle.step(5, IDS[rows]):
            parts.append(handle.compute({name: value[rows] for name, value in batch.items()}, num_items=4).loss)
    torch.testing.assert_close(sum(parts), result.loss)
    with handle.step(5, IDS[1:2]):
        nothing = handle.compute({name: value[1:2] for name, value in batch.items()}, num_items=4)
    assert float(nothing.loss) == float(nothing.consistency) == 0
    with handle.step(5, IDS), pytest.raises(hk.DataError, match="start_positions and end_positions"):
        handle.compute({name: value for name, value in batch.items() if name != "end_positions"})
    squared, batch = answering("bert", hk.Consistency("mse"))
    with squared.step(5, IDS), pytest.raises(hk.ConfigError, match="use kind='kl'"):
        squared.compute(batch)


def test_a_decoder_that_reads_its_inputs_once_more_does_not_count_padding() -> None:
    seen = []
    for width in (0, 3):
        handle, batch = answering("bart", None, mask=False)
        handle.detach()
        span = hk.HiddenKeyConfig(hk.AttentionDrop(pattern="span", rate=0.3), None, consistency=None, layers="all")
        handle = hk.attach(handle.model, span, stock_dropout="off")
        for name, value in (("input_ids", 1), ("attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, width), value=value)
        lengths: dict[str, list[int]] = {}
        handle.record_masks(lambda mask, lengths=lengths: lengths.setdefault(mask.key.site, mask.lengths.tolist()))
        with handle.step(5, IDS):
            handle.compute(batch)
        seen.append(lengths)
    assert seen[0] == seen[1]
    assert seen[0]["attention"] == [9, 7, 5]
    assert seen[0]["decoder-attention"] == [9, 7, 5]


def test_consistency_of_one_number_a_token_is_refused() -> None:
    import transformers as tf

    config_name, _, arguments = families.FAMILIES["electra"]
    model = tf.ElectraForPreTraining(getattr(tf, config_name)(vocab_size=97, **arguments)).train()
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    batch = families.batch("bert")
    batch["labels"] = batch["input_ids"] % 2
    with (
        handle.step(0, IDS),
        pytest.raises(hk.ConfigError, match=r"needs logits of classes \(got .* of ElectraForPreTraining"),
    ):
        handle.loss(**batch)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_token_classification_counts_labelled_tokens(family: str) -> None:
    import transformers as tf

    config_name, _, arguments = families.FAMILIES[family]
    torch.manual_seed(0)
    name = {"bert": "Bert", "llama": "Llama"}[family] + "ForTokenClassification"
    model = getattr(tf, name)(getattr(tf, config_name)(vocab_size=97, num_labels=3, **arguments)).train()
    whole = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), layers="all")
    handle = hk.attach(model, whole, stock_dropout="off")
    batch = families.batch("bert")
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][0, :2] = -100
    carries = batch["labels"] != -100
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    with handle.step(5, IDS):
        result = handle.compute(batch)
        assert int(handle.count_items(batch)) == int(carries.sum())
    torch.testing.assert_close(result.task, first.loss.detach())
    expected = losses.kl(first.logits[carries], second.logits[carries]).mean()
    torch.testing.assert_close(result.consistency, expected.detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_choices_of_an_example_share_its_masks(compiled: bool) -> None:
    import transformers as tf

    config_name, _, arguments = families.FAMILIES["bert"]
    torch.manual_seed(0)
    model = tf.BertForMultipleChoice(getattr(tf, config_name)(vocab_size=97, **arguments)).train()
    whole = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(pattern="column", rate=0.3), layers="all")
    handle = hk.attach(model, whole, stock_dropout="off")
    one = families.batch("bert", rows=2)
    labels = one.pop("labels")
    batch = {name: torch.stack([value, value, value.flip(0)], dim=1) for name, value in one.items()}  # (2, 3, L)
    if compiled:
        model = torch.compile(model, backend="eager")
    for gradient in ("one", "both"):
        handle.config = replace(whole, consistency=hk.Consistency("kl", gradient=gradient))
        with handle.step(5, [7, 8]):
            result = handle.compute({**batch, "labels": labels}, model=model)
            logits = result.outputs.logits
        assert logits.shape == ((2 if gradient == "one" else 4), 3)
        torch.testing.assert_close(logits[:, 0], logits[:, 1])  # equal choices, equal masks
        assert float((logits[:, 0] - logits[:, 2]).abs().min()) > 0
        assert float(result.consistency) > 0
        if gradient == "one":
            kept = result
    torch.testing.assert_close(result.consistency, kept.consistency)
    for wrong in ([7], [7, 8, 9], [7, 7, 7, 8, 8, 8]):
        with (
            handle.step(5, wrong),
            pytest.raises(hk.DataError, match="one sample id for every example, not for every choice"),
        ):
            handle.compute({**batch, "labels": labels}, model=model)


@pytest.mark.parametrize(
    ("family", "base", "shifts"),
    [
        ("llama", "LlamaForCausalLM", True),
        ("gpt2", "GPT2LMHeadModel", True),
        ("t5", "T5ForConditionalGeneration", False),
        ("bert", "BertForMaskedLM", False),
        ("bert", "BertForPreTraining", False),
        ("llama", "LlamaForTokenClassification", False),
        ("bart", "BartForCausalLM", False),
        ("pegasus", "PegasusForCausalLM", False),
    ],
)
def test_who_predicts_the_next_token(family: str, base: str, shifts: bool) -> None:
    import transformers as tf

    config_name, _, arguments = families.FAMILIES[family]
    of_ones_own = type("Mine", (getattr(tf, base),), {})
    model = of_ones_own(getattr(tf, config_name)(vocab_size=97, **arguments)).train()
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("none"), stock_dropout="off")
    assert handle.shifts_labels is shifts
    if not base.endswith(("ConditionalGeneration", "PreTraining", "Classification")):  # more than one mean over tokens
        ids = families.batch("bert")["input_ids"]
        with handle.step(0, IDS):
            torch.testing.assert_close(handle.loss(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids).loss)


def test_regression_by_mean_squared_error() -> None:
    handle = attached("bert", hk.Consistency("mse"), {"num_labels": 1, "problem_type": "regression"})
    batch = {**families.batch("bert"), "labels": torch.tensor([0.5, 1.5, 2.5])}
    first, second = branch(handle, 0, batch), branch(handle, 1, batch)
    with handle.step(5, IDS):
        handle.loss(**batch)
    torch.testing.assert_close(handle.last.consistency, losses.mse(first.logits, second.logits).mean().detach())
    handle.detach()
    handle = attached("bert", hk.Consistency("mse"))
    with (
        handle.step(0, IDS),
        pytest.raises(hk.ConfigError, match="mean squared error compares the outputs of a regression"),
    ):
        handle.loss(**families.batch("bert"))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("gradient", ["one", "both"])
def test_a_split_global_batch_gives_the_same_loss(family: str, gradient: str) -> None:
    handle = attached(family, hk.Consistency("kl", gradient=gradient))
    batch = families.batch(family)
    items = handle.count_items(batch)
    with handle.step(5, IDS):
        whole = handle.compute(batch, items)
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        with handle.step(5, IDS[rows]):
            parts.append(handle.compute({name: value[rows] for name, value in batch.items()}, items))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.consistency for part in parts), whole.consistency)
    with handle.step(5, IDS):
        torch.testing.assert_close(handle.compute(batch).loss, whole.loss)


def test_masked_targets_carry_no_consistency() -> None:
    handle = attached("llama", hk.Consistency("kl"))
    batch = families.batch("llama")
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"][:, :6] = -100
    assert handle.count_items(masked) == masked["labels"][:, 1:].ne(-100).sum() < handle.count_items(batch)
    with handle.step(5, IDS):
        handle.loss(**masked)
    first, second = branch(handle, 0, batch).logits, branch(handle, 1, batch).logits
    rows = [losses.token_rows(x, masked["labels"], shift=True) for x in (first, second)]
    torch.testing.assert_close(handle.last.consistency, losses.kl(*rows).mean().detach())


@pytest.mark.parametrize("gradient", ["one", "both"])
def test_a_micro_batch_without_loss_bearing_tokens_is_exactly_zero(gradient: str) -> None:
    handle = attached("llama", hk.Consistency("kl", gradient=gradient))
    batch = families.batch("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for items in (None, 7):
        with handle.step(5, IDS):
            loss = handle.compute(batch, items).loss
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in handle.model.parameters() if p.grad is not None)


def test_the_output_and_input_positions_drop_elements() -> None:
    parts = {"attention": None, "hidden": None}
    for position in ("input", "output"):
        handle = attached("roberta", None, **parts, **{position: hk.ElementDrop(0.5)})
        drawn = []
        handle.record_masks(drawn.append)
        with handle.step(5, IDS):
            handle.loss(**families.batch("roberta"))
        assert [(mask.key.site, tuple(mask.keep.shape)) for mask in drawn] == [(position, (3, 1, 9, 16))]
        real = torch.arange(9) < torch.tensor([[9], [7], [5]])
        assert handle.realised()[position] == pytest.approx(1 - drawn[0].keep[:, 0][real].float().mean().item())
        handle.detach()
    handle = attached("bert", None, **parts, output=hk.ElementDrop(0.5))
    drawn = []
    handle.record_masks(drawn.append)
    with handle.step(5, IDS):
        handle.loss(**families.batch("bert"))
    assert [tuple(mask.keep.shape) for mask in drawn] == [(3, 1, 1, 16)], "a pooled vector is row 0"


def test_input_dropout_reaches_embeddings_given_in_place_of_ids() -> None:
    results = []
    for embeds in (False, True):
        handle = attached("llama", None, attention=None, hidden=None, input=hk.ElementDrop(0.5))
        batch = families.batch("llama")
        if embeds:
            batch["inputs_embeds"] = handle.model.model.embed_tokens(batch.pop("input_ids"))
        with handle.step(5, IDS):
            results.append(handle.loss(**batch))
    torch.testing.assert_close(*results)


def test_guided_spans_train() -> None:
    handle = attached("bert", None, attention=None, hidden=hk.HiddenDrop("span", 0.3, start="attention"))
    with handle.step(5, IDS):
        handle.loss(**families.batch("bert")).backward()
    # 9, 7 and 5 tokens lose round(.3 n): 3 + 2 + 2 of 21
    assert handle.realised() == {"ffn": pytest.approx(7 / 21)}


def test_rates_by_layer_pattern_and_realised_rates() -> None:
    handle = attached("bert", None, rate_pattern={r"layer\.2": 0.0, r"layer\.3\.output\.dense": 0.6})
    rates = {(row.site, row.layer): row.rate for row in handle.report().rows}
    assert rates == {
        **{(site, layer): 0.3 for site in ("attention", "ffn") for layer in (0, 1, 3)},
        ("ffn", 3): 0.6,
    }
    with handle.step(5, IDS):
        handle.loss(**families.batch("bert"))
    report = handle.report()
    for row in report.rows:
        assert row.calls == 1
        assert abs(row.measured - row.rate) < 0.25
    assert "attention  0" in str(report)
    handle.reset_counts()
    assert handle.realised() == {}


def test_packed_rows_use_each_documents_own_mask() -> None:
    """Two documents in one row see the masks that they see alone."""
    alone, packed = {}, {}
    handle = attached("llama", None)
    batch = families.batch("llama", rows=2, length=6)

    def note(into: dict) -> None:
        def recorder(mask) -> None:
            for sample, keep in zip(mask.samples.tolist(), mask.keep.numpy(), strict=True):
                into[mask.key.site, mask.key.layer, sample] = keep

        handle.record_masks(recorder)

    note(alone)
    with handle.step(5, [7, 8]):
        handle.loss(input_ids=batch["input_ids"][:, :4], labels=batch["input_ids"][:, :4])
    note(packed)
    row = batch["input_ids"][:, :4].reshape(1, 8)
    ids = torch.tensor([[7] * 4 + [8] * 4])
    positions = torch.arange(4).repeat(2)[None]
    with handle.step(5, ids):
        first = handle.loss(input_ids=row, labels=row, position_ids=positions, use_cache=False)
    assert alone.keys() == packed.keys()
    assert all(np.array_equal(alone[key], packed[key]) for key in alone)
    with handle.step(5, ids, positions=positions):
        torch.testing.assert_close(
            handle.loss(input_ids=row, labels=row, position_ids=positions, use_cache=False), first
        )
    changed = row.clone()
    changed[0, 0] = 11
    logits = []
    for tokens in (row, changed):
        with handle.step(5, ids):
            logits.append(handle.model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0, 4:])
    assert torch.equal(*logits), "a document must not see the one before it"


@pytest.mark.parametrize("family", ["bert", "gemma2", "t5"])
def test_bfloat16_autocast(family: str) -> None:
    """What is trained gets a gradient, too: old versions of torch keep weights as the first pass cast them."""
    handle = attached(family, hk.Consistency("kl"))
    reached, losses = [], []
    for automatic in (True, False):
        handle.model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=automatic), handle.step(5, IDS):
            loss = handle.loss(**families.batch(family))
        loss.backward()
        losses.append(float(loss.detach()))
        found = {name: p.grad for name, p in handle.model.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        reached.append(found.keys())
    assert reached[0] == reached[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_how_often_a_step_waits_for_the_device_does_not_grow_with_layers(impl: str) -> None:
    waits = []
    for layers in (2, 8):
        model = families.build("bert", num_hidden_layers=layers).cuda()
        handle = hk.attach(model, config(hk.Consistency("kl")), stock_dropout="off", impl=impl)
        batch = {name: value.cuda() for name, value in families.batch("bert").items()}
        for step in range(3):
            with warnings.catch_warnings(record=True) as seen, handle.step(step, IDS):
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    handle.loss(**batch).backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in seen))
    assert waits[0] == waits[1] <= 8
