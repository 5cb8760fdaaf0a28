"""What the ranks of distributed tests do: steps and trainings of tiny models, told by plain dictionaries."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import transformers as tf
from torch import distributed

import families
import hiddenkey_rs as hk
from hiddenkey_rs.loading.collator import Collator
from hiddenkey_rs.train import Loader

CONFIG = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), layers="all")
BOTH = hk.HiddenKeyConfig(
    hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), consistency=hk.Consistency(gradient="both"), layers="all"
)


def rows(family: str, count: int, seed: int = 3) -> list[dict[str, list[int] | int]]:
    """Examples of uneven length, with labels as the family wants them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(5, 90, (int(torch.randint(3, 9, (), generator=generator)),), generator=generator).tolist()
        masked = [-100] * (number % 3) + ids[number % 3 :]
        found.append({"input_ids": ids, "labels": number % 2 if family in families.ENCODERS else masked})
    return found


class Listener(tf.TrainerCallback):
    """Kills its process at a step, if told to."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def shard_on_cpus() -> None:
    """Let accelerate shard (FSDP2) on CPUs, where it otherwise trains with DDP: torch can, over gloo."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type is not DistributedType.FSDP:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = patched


def trainer(spec: dict[str, Any]) -> hk.HiddenKeyTrainer:
    """A trainer as ``spec`` says; see :func:`train`."""
    family = spec.get("family", "bert")
    if spec.get("arguments", {}).get("fsdp"):
        shard_on_cpus()
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
        **spec.get("arguments", {}),
    }
    args = tf.TrainingArguments(spec["out"], **arguments)
    data = spec.get("data") or rows(family, spec.get("rows", 24))
    if spec.get("store", True):
        data = store(data)
    return hk.HiddenKeyTrainer(
        model=families.build(family, seed=spec.get("model_seed", 0), **({} if family == "t5" else {"initializer_range": 0.2})),
        args=args,
        train_dataset=data,
        config=spec.get("config", CONFIG),
        stock_dropout="off",
        loader=spec.get("loader", Loader()),
        data_collator=Collator() if not spec.get("store", True) else None,
        callbacks=[Listener(spec.get("kill_at"))],
    )


def store(examples: list[dict[str, Any]]) -> hk.TokenStore:
    """The examples as a store."""
    import numpy as np

    ids = [example["input_ids"] for example in examples]
    offsets = np.cumsum([0, *map(len, ids)])
    labels = [example["labels"] for example in examples]
    beside: dict[str, Any] = (
        {"row_columns": {"labels": labels}}
        if isinstance(labels[0], int)
        else {"token_columns": {"labels": np.concatenate(labels)}}
    )
    return hk.TokenStore((np.concatenate(ids), offsets), **beside)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train; what was logged, which samples' masks were drawn at which step, the weights, by this rank."""
    run = trainer(spec)
    drawn: dict[tuple[int, int, str], list[bool]] = {}

    def note(mask: Any) -> None:
        if mask.key.layer == 0 and mask.key.branch == 0 and mask.key.site == "attention":
            for number, sample in enumerate(mask.samples.tolist()):
                length = int(mask.lengths[number])
                drawn[mask.key.step, sample, mask.key.site] = mask.keep[number, ..., :length].flatten().tolist()

    run.handle.record_masks(note)
    run.train(resume_from_checkpoint=spec.get("resume"))
    names = ("loss", "task_loss", "consistency_loss", "realised_rate_attention", "realised_rate_ffn")
    logged = [
        {"step": entry["step"], **{name: entry.get(name) for name in names}}
        for entry in run.state.log_history
        if "loss" in entry
    ]
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in run.model.named_parameters()}
    weights = {name.replace("_checkpoint_wrapped_module.", ""): p.detach().clone() for name, p in whole.items()}
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return {"logged": logged, "drawn": drawn, "weights": {name: value.numpy() for name, value in weights.items()}}


def train_as(specs: list[dict[str, Any]]) -> dict[str, Any]:
    """:func:`train` as this rank's own specification says."""
    return train(specs[int(os.environ["RANK"])])


class Stream(torch.utils.data.IterableDataset):
    """Examples in order, with their numbers."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def __iter__(self) -> Any:
        return ({**example, "sample_id": number} for number, example in enumerate(self.examples))


def train_uneven(spec: dict[str, Any]) -> None:
    """Training on streams of which rank 1's ends earlier."""
    examples = rows("bert", 24 - 8 * int(os.environ["RANK"]))
    arguments = {**spec.get("arguments", {}), "max_steps": 20, "accelerator_config": {"dispatch_batches": False}}
    train({**spec, "data": Stream(examples), "store": False, "loader": "stock", "arguments": arguments})
