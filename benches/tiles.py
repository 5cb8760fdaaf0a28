"""Times the Triton attention kernels by tile sizes, and kept keys alone against masked ones: what defaults are set by.

Run on a CUDA device, on its own: ``PYTHONPATH=python python benches/tiles.py --out FILE.jsonl``. Kernels are compiled first,
by as many processes as there are processors; then each is timed alone (``triton.testing.do_bench``, median). A line is one
kernel under one choice of tiles, one peer, or one comparison of gathering with masking. ``benches/results/tiles_h100.jsonl``
is of two such runs, the first of them of kernels that had one more variant (``turned``: tiles of keys by queries).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hiddenkey_rs.ops import triton_attention, triton_geometry
from hiddenkey_rs.ops.documents import Documents
from hiddenkey_rs.ops.triton_launch import Ready

KINDS = ("forward", "query", "key")
_PRODUCTS = {"forward": 2, "query": 3, "key": 4}
Tiles = tuple[int, int, int, int]
"""Rows, columns, warps, stages."""


class Shape(NamedTuple):
    """An attention. ``elements``: drawn in the kernels; otherwise columns, of which kept keys alone are visited."""

    batch: int
    heads: int
    groups: int
    length: int
    features: int
    causal: bool = False
    elements: bool = False
    dropattention: bool = False


NARROW, WIDE = Shape(32, 12, 12, 2048, 64), Shape(16, 32, 8, 2048, 128)
DRAWN = Shape(16, 16, 16, 2048, 128, elements=True)
SHAPES = [
    NARROW,
    NARROW._replace(causal=True),
    WIDE,
    WIDE._replace(causal=True),
    DRAWN,
    DRAWN._replace(causal=True),
    DRAWN._replace(dropattention=True),
    NARROW._replace(elements=True),
    NARROW._replace(elements=True, causal=True),
    Shape(8, 16, 8, 2048, 256, causal=True),
]
CANDIDATES: list[Tiles] = [
    (128, 128, 8, 2),
    (128, 64, 8, 1),
    (128, 64, 8, 2),
    (128, 64, 4, 2),
    (128, 64, 4, 4),
    (128, 32, 4, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 1),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
]
LENGTHS, RATES = (128, 256, 512, 1024, 2048, 4096), (0.1, 0.2, 0.3)


class Work:
    """Tensors of one attention, and its kernels."""

    def __init__(self, shape: Shape, rate: float = 0.1, gather: bool = True) -> None:
        self.shape = shape
        draw = torch.Generator("cuda").manual_seed(0)
        batch, length, device = shape.batch, shape.length, "cuda"

        def rows(heads: int) -> torch.Tensor:
            made = torch.randn(batch, length, heads, shape.features, device=device, generator=draw)
            return made.to(torch.bfloat16).transpose(1, 2)

        self.query, self.key, self.value, self.gradient = (
            rows(heads) for heads in (shape.heads, shape.groups, shape.groups, shape.heads)
        )
        documents = Documents.of_rows(range(batch), [length] * batch, length, device)
        keys = torch.tensor([[123456789, 987654321]], device=device) if shape.elements else None
        kept = torch.rand(batch, shape.groups, length, device=device, generator=draw) >= rate
        self.how: Any = (
            documents.table, keys, None if shape.elements else kept, documents.queries, documents.keys, documents.shifted,
            round(rate * 65536) if shape.elements else 0, shape.heads if shape.elements else shape.groups,
            shape.features**-0.5, shape.dropattention, shape.causal, 0, documents.cross, gather and not shape.elements,
            documents.full,
        )  # fmt: skip

    def forward(self) -> Any:
        """What the forward operator returns."""
        return triton_attention.attention_forward(self.query, self.key, self.value, *self.how, False)

    def backward(self, outputs: Any) -> Any:
        """Gradients, of what :meth:`forward` returned."""
        return triton_attention.attention_backward(
            self.gradient, self.query, self.key, self.value, *outputs[:4], *self.how
        )

    def both(self) -> None:
        """Forward and backward."""
        self.backward(self.forward())

    def flash(self) -> tuple[float, float]:
        """Milliseconds of SDPA's flash kernels without dropout, forward and backward."""
        inputs = [rows.detach().requires_grad_() for rows in (self.query, self.key, self.value)]
        grouped = self.shape.heads != self.shape.groups
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):

            def forward() -> torch.Tensor:
                return F.scaled_dot_product_attention(*inputs, is_causal=self.shape.causal, enable_gqa=grouped)

            output = forward()
            back = lambda: torch.autograd.grad(output, inputs, self.gradient, retain_graph=True)  # noqa: E731
            return timed(forward), timed(back)

    def alone(self, kind: str, tiles: Tiles, outputs: Any) -> Any:
        """A call that launches one kernel, in these tiles; the backward's other one is left out."""
        chosen, begin, ready = triton_geometry.tiles, triton_geometry.Geometry._launch, Ready()

        def launch(made: Any, which: str, *args: Any) -> Any:
            found = begin(made, which, *args)
            found.programs *= which == kind
            return found

        def call() -> None:
            swapped = {
                "tiles": lambda which, *args: tiles if which == kind else chosen(which, *args),
                "_READY": ready,
            }
            with patch.multiple(triton_geometry, **swapped), patch.object(triton_geometry.Geometry, "_launch", launch):
                self.forward() if kind == "forward" else self.backward(outputs)

        return call


def timed(call: Any) -> float:
    """Milliseconds of a call on the device, the median."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=8, rep=30, return_mode="median"))


def jobs() -> Iterator[tuple[Shape, str, Tiles]]:
    """Every kernel under every choice of tiles."""
    for shape in SHAPES:
        for kind in KINDS:
            for tiles in CANDIDATES:
                if not shape.elements or tiles[1] in (64, 128):
                    yield shape, kind, tiles


def compile_some(start: int, every: int) -> None:
    """Every so-manieth kernel, on a short sequence: the same code serves all lengths."""
    for number, (shape, kind, tiles) in enumerate(jobs()):
        if number % every == start:
            work = Work(shape._replace(batch=1, length=256))
            attempt(work.alone(kind, tiles, work.forward()))
    for number, (shape, gather) in enumerate((s, g) for s in SHAPES[:4] for g in (True, False)):
        if number % every == start:
            Work(shape._replace(batch=1, length=256), gather=gather).both()


def attempt(call: Any) -> bool:
    """Whether it runs: some tiles do not fit into shared memory."""
    try:
        call()
    except Exception as error:  # whatever the compiler raises; the others still count
        if "OutOfResources" not in type(error).__name__:
            raise
        return False
    return True


def main() -> int:
    """Returns the exit code: 2 without a CUDA device."""
    parser = argparse.ArgumentParser("tiles.py", description="Time the attention kernels by tile sizes.")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("tiles.py: this machine has no CUDA device that torch can use; nothing was run\n")
        return 2
    many = max(1, len(os.sched_getaffinity(0)) - 1)
    context = multiprocessing.get_context("spawn")
    compilers = [context.Process(target=compile_some, args=(start, many)) for start in range(many)]
    [process.start() for process in compilers]
    [process.join() for process in compilers]
    with options.out.open("w", encoding="utf-8") as file:
        for line in lines():
            file.write(json.dumps({"gpu": torch.cuda.get_device_name(), **line}) + "\n")
            file.flush()
    return 0


def lines() -> Iterator[dict[str, Any]]:
    """One a peer, a kernel's tiles, and a comparison of gathering with masking."""
    for shape in SHAPES:
        work = Work(shape)
        forward, backward = work.flash()
        yield {**shape._asdict(), "peer": "SDPA, flash, no dropout", "forward_ms": forward, "backward_ms": backward}
        outputs = work.forward()
        flops = 2 * shape.batch * shape.heads * shape.length**2 * shape.features / (2 if shape.causal else 1)
        for one, kind, tiles in jobs():
            call = work.alone(kind, tiles, outputs)
            if one == shape and attempt(call):
                took = timed(call)
                speed = _PRODUCTS[kind] * flops / took / 1e9
                yield {**shape._asdict(), "kernel": kind, "tiles": tiles, "ms": took, "tflops": speed}
    for shape in SHAPES[:4]:
        for length in LENGTHS:
            for rate in RATES:
                cut = shape._replace(length=length, batch=shape.batch * shape.length // length)
                gathered, masked = (timed(Work(cut, rate, gather).both) for gather in (True, False))
                yield {**cut._asdict(), "rate": rate, "gathered_ms": gathered, "masked_ms": masked}


if __name__ == "__main__":
    sys.exit(main())
