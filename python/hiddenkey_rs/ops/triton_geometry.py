"""What the attention kernels are launched with, for tensors of one geometry: worked out once, launched in every step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .triton_launch import Launch, Ready, kernels, precision, shared_memory, tiles

_LOG2E = 1.4426950408889634
_NOTHING, _ELEMENT, _KEYS, _KEPT = 0, 1, 2, 3


class How(NamedTuple):
    """Settings of an attention, in the order in which the operators take them; :func:`.triton_attention.attention` explains."""

    most_queries: int
    most_keys: int
    shifted: bool
    threshold: int
    mask_heads: int
    scaling: float
    dropattention: bool
    causal: bool
    window: int
    cross: bool
    gather: bool
    full: bool


class Mask(NamedTuple):
    """What is kept of which documents: a table of these, and site keys or flags of keys, or neither."""

    table: Tensor
    keys: Tensor | None
    keep: Tensor | None

    def contiguous(self) -> Mask:
        """As the kernels read it."""
        table, keys, keep = self
        return Mask(
            table.contiguous(), None if keys is None else keys.contiguous(), None if keep is None else keep.contiguous()
        )

    def pointers(self, lists: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Documents, keys and flags (or lists of kept keys) for a launch; for what it has no use for, any pointer does."""
        table, keys, keep = self
        flags = keep if lists is None else lists
        return table, table if keys is None else keys, table if flags is None else flags


class Geometry:
    """Launches of an attention's kernels, forward and backward, for tensors of the shapes and strides that it was made of."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, how: How, count: bool) -> None:
        self.how, self.count = how, count
        self.device, self.dtype = query.device, query.dtype
        self.queries, self.keys, self.values = query.shape, key.shape, value.shape
        self._strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        self.documents = len(mask.table)
        self._each = self.documents if mask.keys is None else self.documents // len(mask.keys)
        self.masked = mask.keys is not None or mask.keep is not None
        self._columns = 0 if mask.keep is None else mask.keep.shape[2]
        self.gathers = how.gather and mask.keep is not None
        self.pattern = (
            _KEPT if self.gathers else _KEYS if mask.keep is not None else _ELEMENT if self.masked else _NOTHING
        )
        self._precision = precision(query)
        # A list's kernels write no flags across documents, where no row is lost.
        self.written = how.full and not (self.gathers and how.cross)
        # A list is one query head's or one key/value head's. The former's gradients of keys are added up afterwards.
        self.apart = self.gathers and how.mask_heads != key.shape[1]
        batch, groups = key.shape[0], how.mask_heads if self.apart else key.shape[1]
        self.key_rows, self.value_rows = ((batch, groups, *rows.shape[2:]) for rows in (key, value))
        """The shapes in which gradients of keys and values are written."""
        self.out_shape = (*query.shape[:3], value.shape[3])
        self.out_strides = inside(self.out_shape)
        self.forward = self._launch(
            "forward",
            kernels("attention_forward").forward_kernel,
            (*self._strides, *self.out_strides[:3]),
            (how.scaling * _LOG2E, how.window, how.threshold),
            {"COUNT": count},
        )
        self._backward: dict[tuple[int, ...], tuple[Launch, Launch]] = {}

    def fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether tensors lie in memory as those did that this was made of."""
        given = (query, key, value)
        strides = tuple(stride for rows in given for stride in rows.stride()[:3])
        return strides == self._strides and all(rows.stride(3) == 1 for rows in given)

    def backward(self, gradient: Tensor) -> tuple[Launch, Launch]:
        """The kernels of the queries' gradient and of the keys', for an output's gradient of these strides."""
        given = gradient.stride()
        if given not in self._backward:
            how, made = self.how, kernels("attention_backward")
            settings = (how.scaling, how.scaling * _LOG2E, how.window, how.threshold)
            self._backward[given] = (
                self._launch(
                    "query",
                    made.query_gradient_kernel,
                    (*self._strides, *self.out_strides[:3], *given[:3], *inside(self.queries)[:3]),
                    settings,
                ),
                self._launch(
                    "key",
                    made.key_gradient_kernel,
                    (*self._strides, *given[:3], *inside(self.key_rows)[:3], *inside(self.value_rows)[:3]),
                    settings,
                ),
            )
        return self._backward[given]

    def _launch(
        self,
        kind: str,
        kernel: Any,
        strides: tuple[int, ...],
        settings: tuple[Any, ...],
        flags: dict[str, bool] | None = None,
    ) -> Launch:
        how, heads, groups = self.how, self.queries[1], self.keys[1]
        head, head_v = self.queries[3], self.values[3]
        rows, columns, warps, stages = tiles(
            kind, max(head, head_v), self.dtype, shared_memory(self.device), self.pattern == _ELEMENT, how.causal
        )
        # Element masks are drawn 128 columns at a time, for one tile or two.
        span = max(columns, 128) if self.pattern == _ELEMENT else columns
        # A document whose first key stands inside a tile of positions can touch one more; tiles of a list cannot.
        beyond = (span - 1) * (how.shifted and self.pattern != _KEPT)
        blocks = _blocks(how.most_queries, rows)
        if kind == "key":
            blocks = _blocks(how.most_keys + beyond, span) * (span // columns)
        owners = how.mask_heads if self.pattern == _KEPT else groups
        numbers = (
            heads,
            self.queries[2],
            heads // groups,
            heads // how.mask_heads,
            how.mask_heads,
            self._columns + self.gathers,
            self._each,
            blocks,
        )
        constants = {
            "HEAD": head,
            "HEAD_V": head_v,
            "BLOCK_D": _power(head),
            "BLOCK_V": _power(head_v),
            "ROWS": rows,
            "COLUMNS": columns,
            "PATTERN": self.pattern,
            "DROPATTENTION": how.dropattention,
            "CAUSAL": how.causal,
            "WINDOW": how.window > 0,
            "OWN": not how.cross,
            "PRECISION": self._precision,
            "num_warps": warps,
            # Products and sums become one instruction, which Triton 3.10 must be asked for.
            "enable_fp_fusion": True,
            # One stage more, where there are two, for the positions that rows are loaded by: half a KiB.
            "num_stages": stages + (self.pattern == _KEPT and kind != "key" and stages > 1),
            **(flags or {}),
        }
        programs = blocks * self.documents * (owners if kind == "key" else heads)
        return Launch(kernel, programs, (*strides, *numbers, *settings), constants, self.device)


_READY = Ready()


def geometry(query: Tensor, key: Tensor, value: Tensor, mask: Mask, how: How, count: bool = False) -> Geometry:
    """The launches of tensors like these."""
    place = (
        how,
        count,
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        query.device,
        len(mask.table),
        None if mask.keys is None else len(mask.keys),
        None if mask.keep is None else mask.keep.shape[2],
        precision(query),
    )
    found: Geometry | None = _READY.get(place)
    return _READY.keep(place, Geometry(query, key, value, mask, how, count)) if found is None else found


def inside(shape: Any) -> tuple[int, int, int, int]:
    """Strides of (B, H, L, D) that lies (B, L, H, D) in memory, as models want it."""
    _, heads, length, size = shape
    return length * heads * size, size, heads * size, 1


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _power(head: int) -> int:
    """The width of a tensor-core operand that holds a head."""
    return max(16, 1 << (head - 1).bit_length())
