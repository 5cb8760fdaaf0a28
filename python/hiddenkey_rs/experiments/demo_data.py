"""A generated paraphrase task: pairs of short sentences from a grammar, with near misses and label noise.

Positives are rewritten by meaning-preserving rules (voice, clause order, synonyms); negatives change one thing that
matters (roles, a name, a number, a negation). Together with noise in the training labels a small model can learn it,
and a little later memorises it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .data import Row, Splits

TRAIN, DEV, NOISE = 512, 400, 0.15
_NAMES = [
    "Anna",
    "Boris",
    "Clara",
    "Dmitri",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karla",
    "Louis",
    "Maria",
    "Nadia",
    "Oscar",
    "Paula",
]
_VERBS = {
    "sold": ("sell", "sold"),
    "gave": ("hand over", "handed over"),
    "sent": ("mail", "mailed"),
    "lent": ("loan", "loaned"),
    "showed": ("present", "presented"),
    "promised": ("pledge", "pledged"),
}
_THINGS = {
    "book": "volume",
    "car": "automobile",
    "house": "home",
    "picture": "image",
    "bicycle": "bike",
    "letter": "note",
    "ring": "band",
    "boat": "vessel",
}
_TIMES = {
    "on Monday": "at the start of the week",
    "last year": "a year ago",
    "in the morning": "before noon",
    "at night": "after dark",
    "yesterday": "the day before today",
}
_NUMBERS = ["two", "three", "four", "five", "six", "seven"]


@dataclass(frozen=True)
class _Event:
    giver: str
    taker: str
    verb: str
    number: str
    thing: str
    time: str
    happened: bool = True


def demo_splits(seed: int = 0, train: int = TRAIN, dev: int = DEV, noise: float = NOISE) -> Splits:
    """The task: ``train`` pairs of which a share ``noise`` carries the wrong label, and ``dev`` clean ones.

    Fields ``sentence1``, ``sentence2``, ``label`` (1 = paraphrase). A pure function of its arguments.
    """
    generator = random.Random(seed)
    rows = [_pair(generator, number) for number in range(train + dev)]
    for row in rows[:train]:
        if generator.random() < noise:
            row["label"] = 1 - row["label"]
    return Splits(rows[:train], rows[train:], None)


def _pair(generator: random.Random, number: int) -> Row:
    event = _event(generator)
    label = generator.randrange(2)
    other = event
    while not label and other == event:  # one change or two, never one that takes the other back
        for _ in range(generator.choice((1, 2))):
            other = _near_miss(generator, other)
    first, second = _say(generator, event, plain=True), _say(generator, other, plain=False)
    if generator.random() < 0.5:
        first, second = second, first
    return {"sentence1": first, "sentence2": second, "label": label, "__line__": number + 1}


def _event(generator: random.Random) -> _Event:
    giver, taker = generator.sample(_NAMES, 2)
    choose = generator.choice
    return _Event(
        giver,
        taker,
        choose(list(_VERBS)),
        choose(_NUMBERS),
        choose(list(_THINGS)),
        choose(list(_TIMES)),
        generator.random() < 0.8,
    )


def _near_miss(generator: random.Random, event: _Event) -> _Event:
    """The same event with one thing changed that changes its meaning."""
    change = generator.randrange(10)
    if change == 0:
        return replace(event, giver=event.taker, taker=event.giver)
    if change <= 2:
        return replace(event, happened=not event.happened)
    if change <= 4:
        return replace(event, number=generator.choice([n for n in _NUMBERS if n != event.number]))
    if change <= 6:
        return replace(event, thing=generator.choice([t for t in _THINGS if t != event.thing]))
    if change == 7:
        return replace(event, time=generator.choice([t for t in _TIMES if t != event.time]))
    return replace(event, taker=generator.choice([n for n in _NAMES if n not in (event.giver, event.taker)]))


def _say(generator: random.Random, event: _Event, plain: bool) -> str:
    """One wording of an event; ``plain`` keeps to the simplest words, but never to one clause order."""

    def word(choices: dict[str, str], name: str) -> str:
        return choices[name] if not plain and generator.random() < 0.6 else name

    things = f"{event.number} {word(_THINGS, event.thing)}s"
    time = word(_TIMES, event.time)
    base, past = _VERBS[event.verb]
    past = past if not plain and generator.random() < 0.6 else event.verb
    if not plain and generator.random() < 0.25:
        happened = "were" if event.happened else "were not"
        past = {"gave": "given", "showed": "shown"}.get(past, past)
        core = f"{things} {happened} {past} to {event.taker} by {event.giver}"
    elif event.happened:
        core = f"{event.giver} {past} {things} to {event.taker}"
    else:
        core = f"{event.giver} did not {base} {things} to {event.taker}"
    sentence = f"{time}, {core}" if generator.random() < 0.5 else f"{core} {time}"
    return sentence[0].upper() + sentence[1:] + "."
