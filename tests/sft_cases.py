"""What the tests of the SFT trainer share: a tokenizer of 97 words, a few documents, trainers on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

import families
import hiddenkey_rs as hk

datasets.disable_progress_bars()

CONFIG = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), layers="all")
STILL = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.0), hk.HiddenDrop(rate=0.0), consistency=None)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> tf.PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, families.VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def sentence(number: int, length: int) -> str:
    drawn = np.random.default_rng(number).integers(4, families.VOCABULARY, length)
    return " ".join(f"w{word}" for word in drawn)


def texts(count: int = 12) -> datasets.Dataset:
    """Documents of 3, 5, 7, 9 or 11 words, and the end's token."""
    return datasets.Dataset.from_dict({"text": [sentence(n, 3 + 2 * (n % 5)) for n in range(count)]})


def build(family: str = "llama", **changes: Any) -> Any:
    """A tiny model whose documents, and whose two passes, differ by more than rounding."""
    return families.build(family, **{"initializer_range": 0.2, **changes})


def settings(out: Path, **changes: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
        "max_length": 24,
    }
    return SFTConfig(str(out), **{**defaults, **changes})


_OWN = ("compute_loss_func", "peft_config", "eval_dataset", "loader")


def stock(out: Path, data: Any, model: Any = None, family: str = "llama", **changes: Any) -> SFTTrainer:
    """TRL's own trainer of the same model."""
    own = {name: changes.pop(name) for name in _OWN if name in changes}
    model = build(family) if model is None else model
    return SFTTrainer(
        model=model, args=settings(out, **changes), train_dataset=data, processing_class=tokenizer(), **own
    )


def trainer(
    out: Path, data: Any, model: Any = None, config: Any = CONFIG, family: str = "llama", **changes: Any
) -> hk.HiddenKeySFTTrainer:
    own = {name: changes.pop(name) for name in _OWN if name in changes}
    return hk.HiddenKeySFTTrainer(
        model=build(family) if model is None else model,
        args=settings(out, **changes),
        train_dataset=data,
        processing_class=tokenizer(),
        config=config,
        stock_dropout="off",
        **own,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def furthest(a: torch.nn.Module, b: torch.nn.Module) -> float:
    first, second = weights(a), weights(b)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def logged(run: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if "loss" in entry]


def last_gradient(run: Any) -> dict[str, torch.Tensor]:
    """Gradients of a run's last step; let it have a callback that keeps them."""
    found: dict[str, torch.Tensor] = {}

    class Keep(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    run.add_callback(Keep())
    return found


class Masks(dict):
    """Every mask of every document in its own coordinates, by (step, branch, layer, site, document)."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        run.handle.record_masks(self.note)

    def note(self, mask: Any) -> None:
        for number, sample in enumerate(mask.samples.tolist()):
            length, keep = int(mask.lengths[number]), mask.keep[number].numpy()
            if mask.key.site == "attention":  # columns of tokens behind the document's end stand for nothing
                keep = keep[..., :length]
            if keep.shape[1] > 1:
                keep = keep[:, :length]
            key = (mask.key.step, mask.key.branch, mask.key.layer, mask.key.site, sample)
            assert key not in self or np.array_equal(keep, self[key]), "two masks of one document"
            self[key] = keep.copy()


def same(one: Masks, two: Masks) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def train_ranks(out: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One rank of a training in each layout: weights, logged losses, and whose masks this rank drew."""
    found = []
    for layout in layouts:
        torch.manual_seed(0)
        run = trainer(Path(out), texts(), optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", **layout)
        masks = Masks(run)
        run.train()
        names = ("loss", "task_loss", "consistency_loss", "entropy", "mean_token_accuracy", "num_tokens")
        found.append(
            {
                "weights": {name: value.numpy() for name, value in weights(run.model).items()},
                "logged": {name: logged(run, name) for name in names},
                "masks": dict(masks),
            }
        )
    return found
