"""Scores of generated texts against several references each, over a whole set: what E2E and WebNLG are reported in.

| name | scale | by | as in |
|---|---|---|---|
| ``bleu`` | 0..100 | sacrebleu, 13a tokens, lower case | mteval-v13a of the E2E challenge |
| ``chrf`` | 0..100 | sacrebleu, with case | |
| ``ter`` | percent, low is good | sacrebleu, lower case, punctuation apart | |
| ``nist`` | open | Doddington (2002) on references pooled per text, 13a tokens, lower case | mteval-v13a |
| ``rouge_l`` | 0..100 | rouge-score: F1, the best reference | |
| ``rouge_l_coco`` | 0..100 | pycocoevalcap: recall counts 1.2 times | the E2E challenge, the paper |
| ``cider`` | 0..10 | pycocoevalcap | the E2E challenge, the paper |
| ``meteor`` | 0..100 | pycocoevalcap: METEOR 1.5, a Java program | the E2E challenge, the paper |

A metric whose package or program is missing is reported as absent, with the reason; no other stands in for it.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, DataError, HiddenKeyError
from .extras import extra

Texts = Sequence[str]
References = Sequence[Sequence[str]]
"""Of every text, its references: one at least."""

LOWER_IS_BETTER = frozenset({"ter"})
E2E = ("bleu", "nist", "meteor", "rouge_l", "rouge_l_coco", "cider")
WEBNLG = ("bleu", "meteor", "ter", "chrf")
_NIST_ORDER = 5


@dataclass(frozen=True)
class TextScores:
    """``values`` of the metrics that could be computed, and of the others the reason why not."""

    values: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)


def score_texts(hypotheses: Texts, references: References, metrics: Sequence[str] | None = None) -> TextScores:
    """Score one text a group against the group's references.

    Args:
        hypotheses: what was generated, one text a group. references: the group's own.
        metrics: names, see above; default: all.

    Raises:
        ConfigError: a metric that there is not. DataError: nothing to score, or groups without references.

    Example:
        >>> score_texts(["The cat sat.", "A dog ran."], [["The cat sat."], ["A dog ran."]], ["bleu", "ter"]).values
        {'bleu': 100.0, 'ter': 0.0}
    """
    wanted = tuple(METRICS) if metrics is None else tuple(metrics)
    for name in wanted:
        if name not in METRICS:
            raise ConfigError(f"there is no such text metric (got {name!r}); use {', '.join(METRICS)}")
    _check(hypotheses, references)
    values, absent = {}, {}
    for name in wanted:
        try:
            values[name] = round(float(METRICS[name](hypotheses, references)), 6)
        except HiddenKeyError as error:
            absent[name] = str(error)
    return TextScores(values, absent)


def score_parts(
    hypotheses: Texts, references: References, parts: Sequence[str | None], metrics: Sequence[str] | None = None
) -> dict[str, TextScores]:
    """The scores of ``all`` groups, and of every part where there are several (WebNLG: ``seen`` and ``unseen``).

    Args:
        hypotheses, references, metrics: see :func:`score_texts`. parts: the name of each group's part, or ``None``.
    """
    if len(parts) != len(hypotheses):
        raise DataError(f"every text has a part (got {len(hypotheses)} texts, {len(parts)} parts); give None for none")
    found = {"all": score_texts(hypotheses, references, metrics)}
    names = sorted({part for part in parts if part is not None})
    for name in names if len(names) > 1 else ():
        rows = [row for row, part in enumerate(parts) if part == name]
        found[name] = score_texts([hypotheses[row] for row in rows], [references[row] for row in rows], metrics)
    return found


def flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores by part in one mapping, as tables want them: those of ``all`` by their names, others with their part.

    Example:
        >>> flat({"all": {"bleu": 54.8}, "seen": {"bleu": 62.3}})
        {'bleu': 54.8, 'bleu_seen': 62.3}
    """
    return {
        name if part == "all" else f"{name}_{part}": value
        for part, values in scores.items()
        for name, value in values.items()
    }


def _check(hypotheses: Texts, references: References) -> None:
    if not hypotheses:
        raise DataError("there is nothing to score (got no texts); generate some first")
    if len(hypotheses) != len(references):
        counts = f"{len(hypotheses)} texts, {len(references)} groups of references"
        raise DataError(f"every text needs its references (got {counts}); give one group a text")
    for group, refs in enumerate(references):
        if not any(text.strip() for text in refs):
            raise DataError(f"a group has no references (got {list(refs)!r} in group {group}); leave the group out")
    if not any(text.strip() for text in hypotheses):
        raise DataError(f"all texts are empty (got {len(hypotheses)} of them); the model generates nothing")


def _sacrebleu(name: str, **arguments: Any) -> Callable[[Texts, References], float]:
    def score(hypotheses: Texts, references: References) -> float:
        metric = getattr(extra("sacrebleu.metrics", "text"), name)(**arguments)
        most = max(map(len, references))
        # sacrebleu wants the n-th references of all texts together, None where a text has fewer.
        columns = [[refs[n] if n < len(refs) else None for refs in references] for n in range(most)]
        return float(metric.corpus_score(list(hypotheses), columns).score)

    return score


def _ter(hypotheses: Texts, references: References) -> float:
    """Edits to the nearest reference, over the mean lengths of the references."""
    counts = [_edits(text, tuple(refs)) for text, refs in zip(hypotheses, references, strict=True)]
    return 100 * sum(edits for edits, _ in counts) / sum(words for _, words in counts)


@functools.lru_cache(maxsize=1 << 16)  # slow, and a part's texts are scored with all and alone
def _edits(text: str, refs: tuple[str, ...]) -> tuple[float, float]:
    found = extra("sacrebleu.metrics", "text").TER(normalized=True).sentence_score(text, list(refs))
    return found.num_edits, found.ref_length


def _nist(hypotheses: Texts, references: References) -> float:
    """NIST as mteval-v13a computes it: a hit may come from any of a text's references.

    nltk's ``corpus_nist`` takes the best single reference instead, and comes out lower: 7.65 for 8.68 on E2E. With one
    reference a text they agree.
    """
    nltk = extra("nltk.translate.nist_score", "text")
    split = _mteval_words()
    said = [split(text) for text in hypotheses]
    known = [[split(text) for text in refs] for refs in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for words in (words for refs in known for words in refs):
        seen[()] += len(words)
        for n in range(1, _NIST_ORDER + 1):
            seen.update(nltk.ngrams(words, n))
    score = 0.0
    for n in range(1, _NIST_ORDER + 1):
        gained, possible = 0.0, 0
        for words, refs in zip(said, known, strict=True):
            own = Counter(nltk.ngrams(words, n))
            pooled: Counter[tuple[str, ...]] = Counter()
            for ref in refs:
                pooled |= Counter(nltk.ngrams(ref, n))
            gained += sum(hits * math.log2(seen[gram[:-1]] / seen[gram]) for gram, hits in (own & pooled).items())
            possible += own.total()
        score += gained / max(possible, 1)
    mean_length = sum(sum(map(len, refs)) / len(refs) for refs in known)
    return score * float(nltk.nist_length_penalty(mean_length, sum(map(len, said))))


def _mteval_words() -> Callable[[str], list[str]]:
    tokenizer = extra("sacrebleu.tokenizers.tokenizer_13a", "text").Tokenizer13a()
    return lambda text: str(tokenizer(text)).lower().split()


def _rouge_l(hypotheses: Texts, references: References) -> float:
    scorer = extra("rouge_score.rouge_scorer", "text").RougeScorer(["rougeL"])
    pairs = zip(hypotheses, references, strict=True)
    return 100 * sum(scorer.score_multi(list(refs), text)["rougeL"].fmeasure for text, refs in pairs) / len(hypotheses)


# The captioning metrics read words of the Penn Treebank's tokenizer, without punctuation. That tokenizer is a Java
# program; this one differs from it on 6 of E2E's 4,672 development references, by .03 % of CIDEr.
_WORD = re.compile(
    r"n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"  # clitics are words
    r"|[#$%&+@/()\[\]{}]"
    r"|(?:[^\W\d_]\.){2,}"  # abbreviations
    r"|\w+(?:[-.'/&]\w+|(?<=\d),(?=\d)\w+)*"
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")


def caption_words(text: str) -> str:
    """Lower-case words with single blanks, punctuation left out, as the captioning metrics want them.

    Example:
        >>> caption_words("It's £20-25, isn't it?")
        "it 's # 20-25 is n't it"
    """
    spaced = _CLITIC.sub(r" \1", text.lower().replace("’", "'").replace("£", " # "))
    return " ".join(_WORD.findall(spaced))


def _coco(module: str, name: str, scale: float = 1.0) -> Callable[[Texts, References], float]:
    def score(hypotheses: Texts, references: References) -> float:
        scorer = getattr(extra(f"pycocoevalcap.{module}", "captions"), name)()
        return scale * float(scorer.compute_score(*_captions(hypotheses, references))[0])

    return score


def _captions(hypotheses: Texts, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """(references, texts) by the group's number."""
    known = {n: [caption_words(text) for text in refs] for n, refs in enumerate(references)}
    return known, {n: [caption_words(text)] for n, text in enumerate(hypotheses)}


def _cider(hypotheses: Texts, references: References) -> float:
    if len(hypotheses) < 2:
        raise DataError("CIDEr weighs words by how many groups know them (got one group); score a whole set")
    return _coco("cider.cider", "Cider")(hypotheses, references)


def _meteor(hypotheses: Texts, references: References) -> float:
    module = extra("pycocoevalcap.meteor.meteor", "captions")
    if shutil.which("java") is None:
        raise HiddenKeyError("METEOR 1.5 is a Java program (got no java on the path); install a Java runtime")
    meteor = module.Meteor()
    try:
        return 100 * float(meteor.compute_score(*_captions(hypotheses, references))[0])
    except (OSError, ValueError) as error:
        raise HiddenKeyError(f"METEOR's program failed (got {error}); it needs Java and 2 GiB of memory") from None
    finally:
        if meteor.lock.locked():  # left so by a failure, and its finaliser would wait for ever
            meteor.lock.release()


METRICS: dict[str, Callable[[Texts, References], float]] = {
    "bleu": _sacrebleu("BLEU", lowercase=True),
    "chrf": _sacrebleu("CHRF"),
    "ter": _ter,
    "nist": _nist,
    "rouge_l": _rouge_l,
    "rouge_l_coco": _coco("rouge.rouge", "Rouge", scale=100),
    "cider": _cider,
    "meteor": _meteor,
}
