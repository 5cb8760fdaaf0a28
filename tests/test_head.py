"""A vocabulary head in pieces: the stock model's loss and gradients, on loss-bearing tokens alone."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.nn import functional as F

import families
import hiddenkey_rs as hk
from families import DECODERS, ENCODER_DECODERS
from hiddenkey_rs import losses
from hiddenkey_rs.attachment import head as heads

IDS = [5, 6, 7]
NONE = hk.HiddenKeyConfig.preset("none")


def masked(family: str) -> dict[str, torch.Tensor]:
    """A batch of which only some tokens carry loss."""
    batch = families.batch(family)
    drawn = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return {**batch, "labels": batch["labels"].masked_fill(drawn, -100)}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


HEADS = DECODERS + ENCODER_DECODERS


@pytest.mark.parametrize(
    ("family", "piece"), [*((f, heads.LEAST_ROWS) for f in HEADS), *((f, 1) for f in HEADS if f in families.OWN)]
)
def test_without_dropout_it_is_the_stock_loss(family: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LEAST_ROWS", piece)
    model = families.build(family)
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin, batch = copy.deepcopy(model), masked(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += torch.arange(families.VOCABULARY) / 50
        twin.final_logits_bias += torch.arange(families.VOCABULARY) / 50
    expected = twin(**batch).loss
    expected.backward()
    handle = hk.attach(model, NONE, stock_dropout="off")
    # Blenderbot and M2M100 alone cannot tell what their decoder reads from the labels.
    assert (handle.head is None) is (family in ("blenderbot", "m2m_100"))
    with handle.step(0, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    # float32, summed in another order
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-4, atol=1e-6)


def test_the_head_sees_loss_bearing_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = families.build("llama"), masked("llama")
    rows: list[int] = []
    made = type(model.lm_head).forward

    def forward(self, hidden):
        rows.append(hidden.numel() // hidden.shape[-1])
        return made(self, hidden)

    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    monkeypatch.setattr(model.lm_head, "forward", forward.__get__(model.lm_head))
    with handle.step(0, IDS):
        handle.loss(**batch)
        bearing = int(batch["labels"][:, 1:].ne(-100).sum())
    assert max(rows) == bearing
    assert sum(rows) == 2 * bearing  # two passes


@pytest.mark.parametrize("gradient", ["one", "both"])
@pytest.mark.parametrize("kind", ["kl", "jensen-shannon"])
def test_consistency_is_that_of_whole_logits(kind: str, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LEAST_ROWS", 1)
    model, batch = families.build("llama"), masked("llama")
    config = hk.HiddenKeyConfig(consistency=hk.Consistency(kind=kind, gradient=gradient, weight=0.7), layers="all")
    twin = copy.deepcopy(model)
    handle, slow = hk.attach(model, config), hk.attach(twin, config)
    with handle.step(2, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    slow.head = None
    with slow.step(2, IDS):
        expected = slow.loss(**batch)
    expected.backward()
    for found, wanted in ((loss, expected), (handle.last.task, slow.last.task)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(handle.last.consistency, slow.last.consistency, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-3, atol=1e-5)


def test_a_trained_head_gets_its_gradient_through_peft_and_accumulation() -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "lm_head"])
    model, batch = peft.get_peft_model(families.build("llama"), lora), masked("llama")
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    with handle.step(0, IDS):
        handle.loss(**batch).backward()
    whole = gradients(model)
    assert any("lm_head" in name for name in whole)
    model.zero_grad()
    with handle.step(0, IDS):
        total = handle.count_items(batch)
    for row, sample in enumerate(IDS):
        with handle.step(0, [sample]):
            handle.compute({name: value[row : row + 1] for name, value in batch.items()}, total).loss.backward()
    torch.testing.assert_close(gradients(model), whole, rtol=1e-4, atol=1e-6)


def test_automatic_precision_reaches_the_head() -> None:
    model, batch = families.build("llama"), masked("llama")
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    run = model.forward
    model.forward = lambda *a, **k: torch.autocast("cpu", torch.bfloat16)(run)(*a, **k)  # as accelerate wraps it
    with handle.step(0, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    assert handle.head is not None
    assert handle.head.autocast == {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": True}
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_float16_gradients_survive_many_tokens() -> None:
    """A trainer scales its loss after the head made its gradients: those must not have vanished by then."""
    found = []
    for dtype in (torch.float32, torch.float16):
        model, batch = families.build("llama"), masked("llama")
        handle = hk.attach(model, NONE)
        if dtype == torch.float16:
            run = model.forward
            model.forward = lambda *a, run=run, **k: torch.autocast("cpu", torch.float16)(run)(*a, **k)
        with handle.step(0, IDS):
            loss = handle.compute(batch, torch.tensor(1e7)).loss
        (loss * 2.0**16).backward()
        found.append({name: grad / 2.0**16 for name, grad in gradients(model).items()})
    for name, grad in found[0].items():
        if float(grad.norm()):
            assert float((found[1][name] - grad).norm() / grad.norm()) < 0.1, name


def test_automatic_precision_of_long_rows() -> None:
    """From 192 tokens on attention is an operator of our own, which autocast does not know."""
    model = families.build("llama", max_position_embeddings=256)
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    ids = torch.randint(5, 20, (2, 200))
    losses = []
    for automatic in (True, False):
        with handle.step(0, [5, 6]), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            losses.append(handle.loss(input_ids=ids, labels=ids))
    losses[0].backward()
    assert 0 < abs(float(losses[0] - losses[1])) < 0.02 * float(losses[1])


def test_logits_never_exist_twice() -> None:
    """The largest logits of a step with a large vocabulary are those of one piece."""
    model = families.build("llama", vocab_size=20_000)
    hidden = torch.randn(2, 2000, 16, requires_grad=True)
    head = heads.Head(model.lm_head, None, lambda: None)
    labels = torch.randint(0, 20_000, (4000,))
    largest = 0
    made = F.log_softmax

    def watch(logits, *args, **kwargs):
        nonlocal largest
        largest = max(largest, logits.numel())
        return made(logits, *args, **kwargs)

    F.log_softmax = watch
    try:
        one = torch.tensor(1.0)
        loss, *_ = heads.token_losses(
            head, hidden[0].repeat(2, 1), hidden[1].repeat(2, 1), labels, kind="kl", both=False, scales=(one, one)
        )
        loss.backward()
    finally:
        F.log_softmax = made
    assert largest == heads.LEAST_ROWS * 20_000
    assert hidden.grad is not None


def test_squared_error_of_logits_is_refused() -> None:
    handle = hk.attach(families.build("llama"), hk.HiddenKeyConfig(consistency=hk.Consistency(kind="mse")))
    with handle.step(0, IDS), pytest.raises(hk.ConfigError, match="mean squared error compares"):
        handle.loss(**families.batch("llama"))


def test_differentiating_twice_is_an_error() -> None:
    handle = hk.attach(families.build("llama"), NONE)
    with handle.step(0, IDS):
        loss = handle.loss(**families.batch("llama"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_losses_made_inside_the_model_keep_their_logits() -> None:
    assert hk.attach(families.build("mixtral", output_router_logits=True), NONE).head is None
    assert hk.attach(families.build("bert"), NONE).head is None
    handle = hk.attach(families.build("llama"), hk.HiddenKeyConfig(), stock_dropout="off")
    with handle.step(0, IDS):
        result = handle.compute(families.batch("llama"), task_loss=lambda outputs, labels: outputs.logits.mean())
        assert result.outputs.logits.shape[1] == 9
        assert handle.compute(families.batch("llama")).outputs.logits.shape[1] == 0
    assert losses.IGNORED == -100
