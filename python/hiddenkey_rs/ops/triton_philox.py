"""Stream hk1 inside Triton kernels: Philox4x32-10 on explicit 32-bit counters, and the keep flags of a tile.

The one place that imports Triton. Where it is not installed the kernels exist by name only, and ``obstacle`` of
:mod:`.triton_attention` says why nothing can run them.
"""

# Triton's type inference, not mypy's, checks kernels; their arguments are pointers and scalars of the launch.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN003, ANN201, N803, N806

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - the build without Triton
    triton = tl = None


def jit(function=None, **options):
    """``triton.jit``, or the function itself where Triton is missing."""
    if function is None:
        return lambda inner: jit(inner, **options)
    return function if triton is None else triton.jit(function, **options)


@jit
def sample_words(sample):
    """c2 and c3 of element masks for int64 sample ids in [0, 2**40): uint32 words (the pattern's code is 0)."""
    return (sample & 0xFFFFFFFF).to(tl.uint32), (sample >> 32).to(tl.uint32)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU (``TRITON_INTERPRET=1`` when they were defined)."""
    return triton is not None and not isinstance(sample_words, triton.runtime.jit.JITFunction)


def runs_again(compiled) -> bool:
    """Whether what a launch returned can be launched by itself: of Triton from 3.6 on, and not of its interpreter."""
    if triton is None or interpreted():
        return False
    new = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
    return new and isinstance(compiled, triton.compiler.CompiledKernel)


INTERPRETED = None if tl is None else tl.constexpr(interpreted())


@jit
def product(word, factor: tl.constexpr):
    """High and low word of a product of uint32 words."""
    if INTERPRETED:
        high, low = tl.umulhi(word, factor), tl.mul(word, factor, sanitize_overflow=False)
    else:
        # One instruction for both words. From umulhi and mul the assembler made two, an eighth of a kernel's instructions;
        # of 64-bit numbers the compiler drew tiles in another layout and sent them through shared memory (sm_90).
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b64 both; mul.wide.u32 both, $2, $3; mov.b64 {$1, $0}, both; }",
            "=r,=r,r,r",
            [word, tl.full((), factor, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    return high, low


@jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words of broadcastable shapes.

    Shapes are left as they come and grow by broadcasting: with rows in c0 and columns in c1 the first rounds work on
    a row or a column only, and 5 of the 20 multiplications never touch the whole tile.
    """
    for _ in tl.static_range(10):
        high0, low0 = product(c0, 0xD2511F53)
        high1, low1 = product(c2, 0xCD9E8D57)
        c0 = high1 ^ k0 ^ c1
        c1 = low1
        c2 = high0 ^ (c3 ^ k1)
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def drawn_columns(first, COLUMNS: tl.constexpr):
    """The columns of an element mask's tile: 128 from ``first`` on, or 64 of the 128 around it.

    Those 64 are the first 16 of every 32, or at an odd multiple of 64 the last 16: what half of the generator's calls
    decide, each wholly.
    """
    place = tl.arange(0, COLUMNS)
    columns = first + place
    if COLUMNS == 64:
        columns = first // 128 * 128 + first // 64 % 2 * 16 + place // 16 * 32 + place % 16
    return columns


@jit
def keep_tile(c0, c2, c3, k0, k1, threshold, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep flags of an element mask, int1 (ROWS, COLUMNS): rows by their words, columns by :func:`drawn_columns`.

    One generator call decides 8 columns of a row: COLUMNS / 8 calls a row.

    Args:
        c0: uint32 (ROWS, 1), row | head << 20. c2, c3: sample words, scalars or (ROWS, 1).
        k0, k1: site key, uint32 scalars or (ROWS, 1). threshold: uint32 scalar in [0, 65535].
        first: a multiple of COLUMNS. COLUMNS: 64 or 128.

    Column c reads word (c mod 128) / 32, half c mod 2. Neighbouring columns are the two halves of one word, as a tensor
    core's accumulator lays them out: a thread can draw what it needs itself, and nothing has to be exchanged.
    """
    tl.static_assert(COLUMNS == 64 or COLUMNS == 128)
    CALLS: tl.constexpr = COLUMNS // 8
    c1 = (first // COLUMNS * CALLS + tl.arange(0, CALLS)).to(tl.uint32)[None, :]
    x0, x1, x2, x3 = philox(c0, c1, c2, c3, k0, k1)
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # (row, counter, word / 2, word mod 2)
    # Both halves are compared where they lie: against threshold << 16, the low one shifted up.
    lane = threshold << 16
    halves = tl.join((words << 16) >= lane, words >= lane)
    return halves.permute(0, 2, 3, 1, 4).reshape(ROWS, COLUMNS)


@jit
def ones(keep, held):
    """1 where ``keep``, else 0, as int32, to be summed up. ``held``: floats of the same shape that are in registers.

    Chosen through ``held``, whose layout ties the sum to the flags at hand: by itself the compiler draws the whole mask
    once more, in the layout of the sum. The second choice is for NaN.
    """
    return tl.where(keep & (held == held), 1, 0) | tl.where(keep, 1, 0)
