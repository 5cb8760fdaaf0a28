"""What the ranks of distributed tests do: steps and trainings of tiny models, told by plain dictionaries."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

import torch
import transformers as tf
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

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
    if spec.get("arguments", {}).get("fsdp") and spec.get("patched", True):
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
        model=families.build(
            family, seed=spec.get("model_seed", 0), **({} if family == "t5" else {"initializer_range": 0.2})
        ),
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


def gradients(spec: dict[str, Any]) -> dict[str, Any]:
    """Gradients of one global batch in a loop of one's own, by name, and how many tokens this rank's masks dropped.

    ``spec``: family, config, ``wrap`` (``none``, ``ddp``, or where ``fully_shard`` is applied: ``layers``, ``root``, ``head``,
    ``first`` = layers, before attaching), ``accumulation``, ``checkpointing``, ``bf16``, ``static`` (DDP's ``static_graph``).
    """
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    family, wrap = spec["family"], spec.get("wrap", "none")
    model = families.build(family, **({} if family == "t5" else {"initializer_range": 0.2}))
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrap == "first":
        _shard(model, wrap, spec)
    handle = hk.attach(model, spec.get("config", CONFIG), stock_dropout="off")
    if wrap in ("layers", "root", "head"):
        _shard(model, wrap, spec)
    called = DistributedDataParallel(model, static_graph="static" in spec) if wrap == "ddp" else model
    data = store(rows("bert" if family == "bert" else "llama", spec.get("rows", 7)))
    accumulation = spec.get("accumulation", 1)
    sampler = hk.BatchSampler(data, batch_size=8, accumulation=accumulation, rank=rank, world_size=world)
    collate = Collator()
    batches = [collate(data.__getitems__(micro)) for micro in sampler]
    total = torch.as_tensor(sum(handle.count_items(batch) for batch in batches))
    if world > 1:
        distributed.all_reduce(total)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        if wrap not in ("none", "ddp"):
            model.set_requires_gradient_sync(last)
        with called.no_sync() if wrap == "ddp" and not last else nullcontext():
            with handle.step(3, batch.pop("sample_id")):
                loss = handle.compute(batch, total, model=called).loss * world  # the ranks' gradients are averaged
            loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            found[name] = grad.clone().numpy()
    return {"gradients": found, "counted": handle.counted(), "padded": sum(list(rows) == [-1] for rows in sampler)}


def _shard(model: Any, wrap: str, spec: dict[str, Any]) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if spec.get("bf16") else MixedPrecisionPolicy()
    if wrap != "root":
        for module in list(model.modules()):
            if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer", "T5Block"):
                fully_shard(module, mp_policy=policy)
    if wrap == "head":
        fully_shard(model.lm_head, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


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


def command(arguments: list[str] | list[list[str]], sharded: bool = False) -> tuple[int, str]:
    """The command line's exit code and what it said on standard error; a list of lists: one a rank."""
    from hiddenkey_rs.cli import turns
    from hiddenkey_rs.cli.main import main

    turns.PAUSE = 0.1  # nobody ends the others here
    if sharded:
        shard_on_cpus()
    mine = arguments[int(os.environ["RANK"])] if isinstance(arguments[0], list) else arguments
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(mine)
    return code, said.getvalue()


def agent(port: int, host: bool, log: str, arguments: list[str]) -> None:
    """What ``torchrun --nnodes 1:2 --nproc-per-node 1`` does on a node; its worker is forked, and imports nothing anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.current_process()._config["daemon"] = False  # so that it may have a worker
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    patience = {"last_call_timeout": 2, "keep_alive_interval": 1, "keep_alive_max_attempt": 3, "is_host": host}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=2,
        nproc_per_node=1,
        max_restarts=3,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs=patience,
        local_addr="127.0.0.1",
        start_method="fork",
    )
    elastic_launch(config, _worker)(arguments)


def _worker(arguments: list[str]) -> None:
    from hiddenkey_rs.cli.main import main

    sys.exit(main(arguments))


def written_loop(code: str) -> dict[str, Any]:
    """The weights after ``code``, a loop that somebody wrote down."""
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    else:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = families.build("llama", initializer_range=0.2)
    names = {"hk": hk, "torch": torch, "DistributedDataParallel": DistributedDataParallel, "model": model}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(code, {**names, "store": store(rows("llama", 21)), "optimizer": optimizer})
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def first_fsdp() -> None:
    """A step through FSDP's first version."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    distributed.init_process_group("gloo")
    model = families.build("llama")
    handle = hk.attach(model, CONFIG, stock_dropout="off")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with handle.step(0, [0, 1, 2]):
        handle.compute(families.batch("llama"), model=wrapped)


def silent() -> None:
    """Rank 1 falls silent; rank 0 waits for it."""
    from hiddenkey_rs.train.heartbeat import heartbeat

    distributed.init_process_group("gloo")
    with heartbeat(beat=0.2, silence=2.0):
        distributed.barrier()
        if distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        distributed.barrier()


def fine_tune(spec: dict[str, Any]) -> list[dict[str, float]]:
    """TRL's supervised fine-tuning; what was logged."""
    import datasets
    import trl

    from hiddenkey_rs.experiments.models import byte_tokenizer
    from hiddenkey_rs.train.sft import HiddenKeySFTTrainer

    data = datasets.Dataset.from_list([{"prompt": f"say {n}", "completion": " no" * (n % 4 + 1)} for n in range(21)])
    args = trl.SFTConfig(
        spec["out"],
        max_steps=3,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        packing=spec["packing"],
        max_length=64,
        learning_rate=0.1,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    run = HiddenKeySFTTrainer(
        families.build("llama", vocab_size=300, max_position_embeddings=80),
        args,
        train_dataset=data,
        processing_class=byte_tokenizer(),
        config=CONFIG,
        stock_dropout="off",
        loader="hiddenkey",
    )
    run.train()
    names = ("loss", "consistency_loss", "entropy", "mean_token_accuracy", "num_tokens")
    return [{name: entry[name] for name in names} for entry in run.state.log_history if "loss" in entry]
