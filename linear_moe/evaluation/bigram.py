"""A smoothed bigram model: the loss that a language model with any use of context has to be below.

P(b | a) = (max(n(a,b) - d, 0) + (c + d * m(a)) * Q(b)) / (n(a) + c)

with n the counts of the training tokens, m(a) the number of different successors of a, d in [0, 1) an absolute
discount, c >= 0 a concentration, and Q(b) either how often b occurs or how many different tokens it follows
(Kneser and Ney, ICASSP 1995), itself smoothed towards uniform. d = 0 is Dirichlet smoothing, c = 0 interpolated
Kneser-Ney; both together is the Pitman-Yor form (Teh, ACL 2006). d, c and the kind of Q are chosen on held-out
training documents: validation is looked at once.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

DISCOUNTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CONCENTRATIONS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0)
HELD_OUT_EVERY = 20
_SORT_TOKENS = 2**24


@dataclass(frozen=True)
class BigramResult:
    """nats_per_token: mean over `tokens` predicted tokens: all of validation but its very first, EOD included."""

    nats_per_token: float
    tokens: int
    discount: float
    concentration: float
    continuation: bool  # Q counts different predecessors instead of occurrences


def bigram_loss(train: Iterable[np.ndarray], validation: Iterable[np.ndarray], vocab_size: int) -> BigramResult:
    """Loss on `validation` of a bigram model of `train`.

    train, validation: documents in order, each a 1-D integer array of token ids that ends in EOD, so the first token
        of a document is predicted from EOD, as in the stream that Megatron trains on.
    vocab_size: ids are below it; counts are sparse, so 50,000 and more are fine. Memory follows the number of
        different pairs.

    Raises ValueError for fewer than two documents in train, an empty validation set, and ids outside the vocabulary.
    """
    train = list(train)
    if len(train) < 2:
        raise ValueError(f"a bigram needs at least 2 training documents, to hold one out; got {len(train)}")
    every = min(HELD_OUT_EVERY, len(train))
    held_out = _Pairs.count(train[::every], vocab_size)
    kept = _Counts(_Pairs.count((d for i, d in enumerate(train) if i % every), vocab_size), vocab_size)
    look_up = kept.look_up(held_out)
    choices = itertools.product(DISCOUNTS, CONCENTRATIONS, (False, True))
    # Without any smoothing an unseen pair, of which validation may have more than the held-out part, is impossible.
    choices = [choice for choice in choices if choice[0] or choice[1]]
    discount, concentration, continuation = min(choices, key=lambda choice: kept.loss(held_out, look_up, *choice))
    pairs = _Pairs.count(validation, vocab_size)
    counts = _Counts(_Pairs.count(train, vocab_size), vocab_size)
    loss = counts.loss(pairs, counts.look_up(pairs), discount, concentration, continuation)
    return BigramResult(loss, pairs.total, discount, concentration, continuation)


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Loss in bits per UTF-8 byte, comparable between tokenizers. tokens and bytes: of the same text."""
    return nats_per_token * tokens / text_bytes / math.log(2)


@dataclass(frozen=True)
class _Pairs:
    """Different pairs as keys first * vocab + second (int64, sorted), and how often each occurs (int64)."""

    keys: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @classmethod
    def count(cls, documents: Iterable[np.ndarray], vocab_size: int) -> "_Pairs":
        parts = [np.unique(keys, return_counts=True) for keys in _keys(documents, vocab_size)]
        if not parts:
            raise ValueError("no pair of tokens to count: the documents hold fewer than 2 tokens")
        keys, inverse = np.unique(np.concatenate([p[0] for p in parts]), return_inverse=True)
        counts = np.zeros(keys.size, dtype=np.int64)
        np.add.at(counts, inverse, np.concatenate([p[1] for p in parts]))
        return cls(keys, counts)


def _keys(documents: Iterable[np.ndarray], vocab_size: int) -> Iterator[np.ndarray]:
    # In pieces of _SORT_TOKENS, so that memory follows the number of different pairs and not the corpus.
    pieces: list[np.ndarray] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        if document is not None:
            pieces.append(np.asarray(document))
            size += pieces[-1].size
        if size > 1 and (document is None or size >= _SORT_TOKENS):
            stream = np.concatenate(pieces).astype(np.int64)
            if stream.min() < 0 or stream.max() >= vocab_size:
                raise ValueError(f"token ids {stream.min()} to {stream.max()} do not fit a vocabulary of {vocab_size}")
            yield stream[:-1] * vocab_size + stream[1:]
            pieces, size = [stream[-1:]], 1


class _Counts:
    """What the model needs of its training pairs; see the formula at the top."""

    def __init__(self, pairs: _Pairs, vocab_size: int):
        self.pairs, self.vocab_size = pairs, vocab_size
        first, second = np.divmod(pairs.keys, vocab_size)
        self.n_first = np.bincount(first, weights=pairs.counts, minlength=vocab_size)
        self.successors = np.bincount(first, minlength=vocab_size)
        occurrences = np.bincount(second, weights=pairs.counts, minlength=vocab_size)
        predecessors = np.bincount(second, minlength=vocab_size)
        # Half a count more for each token: one that was never seen gets a probability too.
        self.lower_order = [(n + 0.5) / (n.sum() + 0.5 * vocab_size) for n in (occurrences, predecessors)]

    def look_up(self, pairs: _Pairs) -> np.ndarray:
        """n(a,b) for each of `pairs`."""
        place = np.minimum(np.searchsorted(self.pairs.keys, pairs.keys), self.pairs.keys.size - 1)
        return np.where(self.pairs.keys[place] == pairs.keys, self.pairs.counts[place], 0)

    def loss(
        self, pairs: _Pairs, n_pair: np.ndarray, discount: float, concentration: float, continuation: bool
    ) -> float:
        """Mean negative log-likelihood of `pairs` in nats."""
        first, second = np.divmod(pairs.keys, self.vocab_size)
        q = self.lower_order[continuation][second]
        total = self.n_first[first]
        rest = concentration + discount * self.successors[first]
        numerator, denominator = np.maximum(n_pair - discount, 0) + rest * q, total + concentration
        # After a token that was never seen as a first one only Q is left; with c = 0 the formula says 0 / 0 there.
        p = np.divide(numerator, denominator, out=q.copy(), where=total > 0)
        with np.errstate(divide="ignore"):  # d = c = 0 gives an unseen pair no probability: its loss is infinite
            return float(-(np.log(p) * pairs.counts).sum() / pairs.total)
