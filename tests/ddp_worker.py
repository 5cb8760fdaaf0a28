"""One rank of a data-parallel step; prints a digest of the averaged gradients. Started by tests/test_ddp.py."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import families
import hiddenkey_rs as hk

ROWS = 4


def main(family: str, preset: str, reentrant: str, out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = families.build(family)
    if reentrant != "none":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant == "yes"})
        model.enable_input_require_grads()
    handle = hk.attach(model, preset, stock_dropout="off")
    batch = families.batch(family, rows=ROWS)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    wrapped = DistributedDataParallel(model)
    total = handle.count_items(batch)
    for step in range(2):
        model.zero_grad()
        with handle.step(step, list(range(ROWS))[mine]):
            part = {name: value[mine] for name, value in batch.items()}
            # DDP takes the mean of the ranks' gradients, of sums over all rows.
            loss = handle.compute(part, total, model=wrapped).loss * world
        loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main(*sys.argv[1:])
