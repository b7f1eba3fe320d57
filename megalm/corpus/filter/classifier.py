"""A quality classifier out of two sets of texts: hashed words and pairs of words, logistic regression.

A text's features are the buckets of its different words and pairs of words (the hashes of megalm/corpus/dedup/shingles.py),
each with the weight 1 / sqrt(their number). Source: Weinberger et al. 2009 (arXiv:0902.2206) for the hashing; such classifiers
chose the data of GPT-3 (Brown et al. 2020, appendix A) and DCLM (Li et al. 2024, arXiv:2406.11794).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.shingles import make_shingles
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.filter.batch import Batch

FORMAT = "megalm-text-classifier-1"
BITS = 20  # of a bucket: a million weights, 4 MB
RUNS = (1, 2)  # words of a feature
HELD_OUT = 5  # of so many texts of each set the last is measured, and the one before sets how sure the others make us
LEAST = 20  # texts of each set
STEPS = 60
LEARNING_RATE = 0.5  # of Adagrad
DECAY = 1e-6  # of the weights, towards 0
CALIBRATION_BINS = 10
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Features:
    """Buckets of several texts one after another.

    Shapes: buckets uint32 [all], offsets int64 [texts + 1]
    """

    buckets: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def scores(self, weights: np.ndarray, bias: float) -> np.ndarray:
        """The log-odds of each text. Shapes: weights float32 [2^BITS] -> float64 [texts]"""
        counts = np.diff(self.offsets)
        sums = np.zeros(len(self))
        filled = np.flatnonzero(counts)
        if len(filled):
            taken = weights[self.buckets].astype(np.float64)
            sums[filled] = np.add.reduceat(taken, self.offsets[filled])
        return sums / np.sqrt(np.maximum(counts, 1)) + bias

    def some(self, numbers: np.ndarray) -> Features:
        """The features of these texts."""
        counts = np.diff(self.offsets)[numbers]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        places = (
            np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], counts) + np.repeat(self.offsets[numbers], counts)
        )
        return Features(self.buckets[places], offsets)


def make_features(texts: Texts) -> Features:
    """Make the features of texts, however many they are."""
    parts = [make_shingles(texts, words) for words in RUNS]
    owners = np.concatenate([np.repeat(np.arange(len(texts)), np.diff(offsets)) for _, offsets in parts])
    buckets = np.concatenate([values >> np.uint64(64 - BITS) for values, _ in parts]).astype(np.uint32)
    order = np.argsort(owners, kind="stable")
    return Features(buckets[order], np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=len(texts))))))


def join_features(parts: Sequence[Features]) -> Features:
    """The features of several batches as one."""
    buckets = np.concatenate([np.empty(0, np.uint32), *(part.buckets for part in parts)])
    counts = np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    return Features(buckets, np.concatenate(([0], np.cumsum(counts))))


@dataclass(frozen=True)
class Bin:
    """Of the held-out texts whose probability is about so high: how many, the mean probability, and how many are good."""

    texts: int
    predicted: float
    good: float


@dataclass(frozen=True)
class Quality:
    """How well the held-out texts are told apart."""

    texts: int
    auc: float
    accuracy: float
    calibration_error: float
    """Mean distance of what is predicted and what is so, over the bins, weighted by their texts; both sets count alike."""
    bins: list[Bin]
    thresholds: list[tuple[float, float, float]]
    """(share of the second set that stays, probability that keeps it, share of the first set that stays with it)"""


@dataclass(frozen=True)
class Classifier:
    """Weights of the buckets. Shapes: weights float32 [2^BITS]"""

    weights: np.ndarray
    bias: float

    def probabilities(self, texts: Texts) -> np.ndarray:
        """How sure it is of each text that it belongs to the first set. Shapes: -> float64 [texts]"""
        return _logistic(make_features(texts).scores(self.weights, self.bias))

    def encode(self, quality: Quality) -> bytes:
        """Encode a file of safetensors with the weights and what was measured of them."""
        notes = json.dumps({"format": FORMAT, "bias": self.bias, "quality": asdict(quality)})
        return save({"weights": self.weights}, {"classifier": notes})  # one entry: several come in any order


@lru_cache(maxsize=4)
def load_classifier(path: str) -> Classifier:
    """Load a classifier that `Classifier.encode` gave.

    Errors: ConfigError for a file that is not there, or of another format.
    """
    try:
        with safe_open(path, "numpy") as file:
            notes = json.loads((file.metadata() or {}).get("classifier", "{}"))
            if notes.get("format") != FORMAT:
                raise ConfigError(
                    f"{path} holds no classifier of `megalm filter train`, but other tensors: name another file."
                )
            weights = file.get_tensor("weights")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"classifier {path} cannot be read ({error}): train one by `megalm filter train`.") from error
    if weights.shape != (1 << BITS,) or weights.dtype != np.float32 or not np.isfinite(weights).all():
        raise ConfigError(
            f"{path}: weights are {weights.dtype} {weights.shape}, not float32 ({1 << BITS},): train it again."
        )
    return Classifier(weights, float(notes["bias"]))


def train_classifier(good: Features, bad: Features) -> tuple[Classifier, Quality]:
    """Logistic regression by Adagrad over all texts, both sets with the same weight; measured on those that are held out.

    Errors: ConfigError if there are too few texts.
    """
    for name, one in (("good", good), ("bad", bad)):
        if len(one) < LEAST:
            raise ConfigError(f"--{name} has {len(one)} texts: give at least {LEAST}, better some thousands.")
    sets = [(one, HELD_OUT - np.arange(len(one)) % HELD_OUT) for one in (good, bad)]
    train, middle, test = (
        [one.some(np.flatnonzero(wanted(place))) for one, place in sets]
        for wanted in (lambda place: place > 2, lambda place: place == 2, lambda place: place == 1)
    )
    weights, bias = _fit(join_features(train), np.repeat((1.0, 0.0), [len(one) for one in train]))
    slope, shift = _calibrate(*(one.scores(weights, bias) for one in middle))
    classifier = Classifier((slope * weights).astype(np.float32), slope * bias + shift)
    probabilities = [_logistic(one.scores(classifier.weights, classifier.bias)) for one in test]
    return classifier, _measure(*probabilities)


def _calibrate(good: np.ndarray, bad: np.ndarray) -> tuple[float, float]:
    """Slope and shift of log-odds by which they fit texts that were not trained on (Platt 1999), by Newton's method; both
    sets count alike. A little decay keeps the slope finite where the sets do not overlap."""
    scores, is_good = np.concatenate((good, bad)), np.repeat((1.0, 0.0), (len(good), len(bad)))
    importance = np.where(is_good > 0, 0.5 / len(good), 0.5 / len(bad))
    inputs, found, decay = np.stack((scores, np.ones(len(scores)))), np.array([1.0, 0.0]), 1e-3
    for _ in range(50):
        chance = _logistic(found @ inputs)
        slope = inputs @ (importance * (chance - is_good)) + decay * (found - (1.0, 0.0))
        curve = (inputs * (importance * chance * (1 - chance))) @ inputs.T + decay * np.eye(2)
        found = found - np.linalg.solve(curve, slope)
    return float(found[0]), float(found[1])


def _fit(features: Features, is_good: np.ndarray) -> tuple[np.ndarray, float]:
    share = is_good.mean()
    importance = np.where(is_good > 0, 0.5 / share, 0.5 / (1 - share)) / len(is_good)
    counts = np.diff(features.offsets)
    scale = 1 / np.sqrt(np.maximum(counts, 1))
    owner = np.repeat(np.arange(len(features)), counts)
    weights, bias = np.zeros(1 << BITS, np.float32), 0.0
    squares, bias_squares = np.full(1 << BITS, 1e-12), 1e-12
    for _ in range(STEPS):
        wrong = (_logistic(features.scores(weights, bias)) - is_good) * importance
        gradient = np.bincount(features.buckets, (wrong * scale)[owner], 1 << BITS) + DECAY * weights
        squares += gradient**2
        weights -= (LEARNING_RATE * gradient / np.sqrt(squares)).astype(np.float32)
        bias_squares += float(wrong.sum()) ** 2
        bias -= LEARNING_RATE * float(wrong.sum()) / bias_squares**0.5
    return weights, bias


def _logistic(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(scores, -60, 60)))


def _measure(good: np.ndarray, bad: np.ndarray) -> Quality:
    both, is_good = np.concatenate((good, bad)), np.repeat((True, False), (len(good), len(bad)))
    ordered = np.sort(bad)
    below = (np.searchsorted(ordered, good) + np.searchsorted(ordered, good, side="right")) / 2
    accuracy = ((good >= 0.5).mean() + (bad < 0.5).mean()) / 2
    place = np.minimum((both * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    weight = np.where(is_good, 0.5 / len(good), 0.5 / len(bad))  # both sets count alike, as they did in training
    bins, error = [], 0.0
    for number in range(CALIBRATION_BINS):
        here = place == number
        if here.any():
            share = weight[here] / weight[here].sum()
            bins.append(Bin(int(here.sum()), float(share @ both[here]), float(share @ is_good[here])))
            error += float(weight[here].sum()) * abs(bins[-1].predicted - bins[-1].good)
    limits = [(rate, float(np.quantile(bad, 1 - rate))) for rate in RATES]
    thresholds = [(rate, limit, float((good >= limit).mean())) for rate, limit in limits]
    return Quality(len(both), float(below.mean() / len(bad)), float(accuracy), error, bins, thresholds)


@dataclass(frozen=True)
class Classified:
    """How sure a classifier is that a text belongs to its first set."""

    path: str
    score: str = "quality"
    needs_fields = False

    @property
    def gives(self) -> tuple[str, ...]:
        """The probability."""
        return (self.score,)

    def apply(self, batch: Batch) -> None:
        """Gives the probability."""
        batch.give(self.score, load_classifier(self.path).probabilities(batch.texts))


def gather_features(batches: Iterable[Texts], most: int) -> Features:
    """Gather the features of the first `most` texts."""
    parts, left = [], most
    for texts in batches:
        found = make_features(texts)
        parts.append(found if len(found) <= left else found.some(np.arange(left)))
        left -= len(parts[-1])
        if left == 0:
            break
    return join_features(parts)
