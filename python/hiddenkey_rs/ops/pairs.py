"""Element masks of attention laid over a batch, as one torch operator: a compiled graph calls it, and the core draws inside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks
from ..config import RATE_LEVELS
from .generator import element_keep

_SITES = {code: name for name, code in masks.SITES.items()}
_SEED = (1 << 64) - 1


@torch.library.custom_op("hiddenkey_rs::element_pairs", mutates_args=())
def element_pairs(
    words: Tensor,
    samples: Tensor,
    extent: Tensor,
    document: Tensor,
    rows: Tensor,
    columns: Tensor,
    threshold: int,
    heads: int,
) -> Tensor:
    """Keep mask of every (query, key) pair of a batch, bool (B, heads, Q, K), True = keep.

    Args:
        words: int64 (branches, 5) on the host, the :attr:`~hiddenkey_rs.MaskKey.words` of as many equal parts of the
            documents; the seed's 64 bits as they are.
        samples: int64 (documents,), ids in [0, 2**40).
        extent: int64 (3,) on the host: rows and columns of the longest document, and whether the batch is aligned (row b
            holds document b alone, from its first token on). A tensor, so that compiled code does not depend on it.
        document, rows: int64 (B, Q), each query's document and its place in it. columns: int64 (B, K), each key's place.
        threshold: of the rate, 0..65536. heads: how many the mask is drawn for.

    Example:
        >>> import hiddenkey_rs as hk
        >>> words = torch.tensor([hk.MaskKey(seed=1).words])
        >>> place = torch.arange(3)[None]
        >>> keep = element_pairs(words, torch.tensor([7]), torch.tensor([3, 3, 1]), place * 0, place, place, 32768, 2)
        >>> bool((keep.numpy() == hk.masks.element_bool(hk.MaskKey(seed=1), [7], 3, 3, 0.5, heads=2)).all())
        True
    """
    many, wide, aligned = extent.tolist()
    parts = []
    for (seed, *rest), ids in zip(words.tolist(), samples.tensor_split(len(words)), strict=True):
        step, branch, layer, site = rest
        key = masks.MaskKey(seed & _SEED, step, branch, layer, _SITES[site])
        if ids.device.type == "cpu":
            rate = threshold / RATE_LEVELS
            parts.append(torch.from_numpy(masks.element_bool(key, ids.numpy(), many, wide, rate, heads=heads)))
        else:
            parts.append(element_keep(key.derive(), ids, many, wide, threshold, heads))
    return lay_pairs(torch.cat(parts), document, rows, columns, aligned=bool(aligned)).contiguous()


@element_pairs.register_fake
def _(
    words: Tensor,
    samples: Tensor,
    extent: Tensor,
    document: Tensor,
    rows: Tensor,
    columns: Tensor,
    threshold: int,
    heads: int,
) -> Tensor:
    return columns.new_empty((rows.shape[0], heads, rows.shape[1], columns.shape[1]), dtype=torch.bool)


def lay_pairs(drawn: Tensor, document: Tensor, rows: Tensor, columns: Tensor, *, aligned: bool) -> Tensor:
    """Masks of documents, bool (documents, heads, rows, columns), over the batch: (B, heads, Q, K).

    ``document``, ``rows``, ``columns``, ``aligned``: as :func:`element_pairs`.
    """
    queries, keys = rows.shape[1], columns.shape[1]
    if aligned:
        return F.pad(drawn, (0, keys - drawn.shape[3], 0, queries - drawn.shape[2]))
    if not drawn.numel():
        return drawn.new_zeros(rows.shape[0], drawn.shape[1], queries, keys)
    # Pairs of different documents are no pairs of a mask: a well-formed packed batch forbids them anyway.
    where = (document[:, :, None], slice(None), rows[:, :, None], columns[:, None, :])
    return drawn[where].permute(0, 3, 1, 2)
