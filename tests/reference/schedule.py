"""Global batches and their sharing out, sample by sample, straight from the definition in DESIGN.md."""

from __future__ import annotations

from collections.abc import Sequence

from . import order as orders


def cost(lengths: Sequence[int]) -> int:
    """Padded tokens of a micro-batch; an empty example takes a place, too."""
    return len(lengths) * max(1, *lengths) if lengths else 0


def epoch_order(seed: int, epoch: int, size: int, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(size))
    if size <= orders.SHUFFLED:
        return orders.shuffled(seed, epoch, 0, size)
    return [orders.order(seed, epoch, size, position) for position in range(size)]


def greedy(rows: list[int], lengths: Sequence[int], cap: int) -> list[list[int]]:
    """Sorted rows into batches: each takes rows while its padded tokens are at most ``cap``."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and cost([lengths[r] for r in [*batches[-1], row]]) <= cap:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def batches_of_window(
    rows: list[int],
    lengths: Sequence[int],
    batch_size: int | None,
    token_budget: int | None,
    drawn: tuple[int, int, int] | None,
) -> list[list[int]]:
    """The batches of a window in the order in which they run. ``drawn``: (seed, epoch, window), or None: nothing is drawn."""
    rows = sorted(rows, key=lambda row: -lengths[row])
    if token_budget is not None:
        fewest = len(greedy(rows, lengths, token_budget))
        cap = next(cap for cap in range(1, token_budget + 1) if fitting(rows, lengths, cap, fewest))
        batches = greedy(rows, lengths, cap)
        places = _places(drawn, len(batches))
    else:
        assert batch_size is not None
        places = _places(drawn, -(-len(rows) // batch_size))
        batches = []
        for place in range(len(places)):
            last = place == places[-1]
            many = batch_size if not last else len(rows) - batch_size * (len(places) - 1)
            start = sum(map(len, batches))
            batches.append(rows[start : start + many])
    return [batches[place] for place in places]


def fitting(rows: list[int], lengths: Sequence[int], cap: int, fewest: int) -> bool:
    batches = greedy(rows, lengths, cap)
    return len(batches) == fewest and all(cost([lengths[row] for row in batch]) <= cap for batch in batches)


def _places(drawn: tuple[int, int, int] | None, count: int) -> list[int]:
    if drawn is None:
        return list(range(count))
    seed, epoch, window = drawn
    return [orders.order(seed, epoch, count, k, which=window + 1) for k in range(count)]


def global_batches(
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    window: int,
    tail: str,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> list[list[list[int]]]:
    """Every window's global batches, in the order in which they run."""
    order = epoch_order(seed, epoch, len(lengths), shuffle)
    if batch_size is not None and tail == "drop":
        order = order[: len(order) - len(order) % batch_size]
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    return [
        batches_of_window(rows, lengths, batch_size, token_budget, (seed, epoch, number) if shuffle else None)
        for number, rows in enumerate(windows)
    ]


def runs(lengths: list[int], parts: int, cap: int) -> list[list[int]] | None:
    """Row numbers of a sorted batch in ``parts`` runs, each as long as ``cap`` and the parts behind it allow."""
    found: list[list[int]] = []
    row = 0
    for left in range(parts - 1, -1, -1):
        run: list[int] = []
        while row < len(lengths) - left and cost([lengths[r] for r in [*run, row]]) <= cap:
            run.append(row)
            row += 1
        if not run:
            return None
        found.append(run)
    return found if row == len(lengths) else None


def share(lengths: list[int], ranks: int, micro: int) -> list[list[list[int]]]:
    """Of a batch sorted by falling length: the row numbers of every rank's micro-batches; [] where no row is left."""
    parts = min(ranks * micro, len(lengths))
    cut = next(found for cap in range(1, cost(lengths) + 1) if (found := runs(lengths, parts, cap)) is not None)
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    costs = {part: cost([lengths[row] for row in run]) for part, run in enumerate(cut)}
    for part in sorted(costs, key=lambda part: (-costs[part], part)):
        loads = [
            (sum(cost([lengths[row] for row in run]) for run in mine), rank)
            for rank, mine in enumerate(dealt)
            if len(mine) < micro
        ]
        dealt[min(loads)[1]].append(cut[part])
    return [mine + [[]] * (micro - len(mine)) for mine in dealt]


def share_plain(rows: list[int], ranks: int, micro: int) -> list[list[list[int]]]:
    """The same where lengths are unknown: as equal numbers of consecutive rows as can be."""

    def parts(items: list[int], count: int) -> list[list[int]]:
        return [items[k * len(items) // count : (k + 1) * len(items) // count] for k in range(count)]

    return [parts(mine, micro) for mine in parts(rows, ranks)]
