"""Interpolated bigram language model: the floor that a trained model has to pass.

Jelinek-Mercer smoothing (Jelinek and Mercer, 1980; Chen and Goodman, 1999, section 2.3): the maximum-likelihood
bigram, the maximum-likelihood unigram and the uniform distribution are mixed with weights that depend on how often
the context was seen. The weights are found by expectation maximisation on a held-out slice of the training tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from foejax.data import Batch, Dataset

_HELD_OUT_FRACTION = 0.1
_ITERATIONS = 50


@dataclass(frozen=True)
class BigramResult:
    """Loss of the baseline over the targets it was evaluated on."""

    nats_per_token: float
    bits_per_byte: float


class BigramModel:
    """p(next | context) as a mixture of bigram, unigram and uniform distribution.

    Attributes:
      mixture_C3: [C, 3] float64, weights of bigram, unigram and uniform for each class of context count; class c
        holds contexts seen 2^(c-1) to 2^c - 1 times, class 0 those never seen.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.mixture_C3 = np.empty((0, 3))

    def fit(self, tokens: np.ndarray) -> None:
        """Find the mixture on the last tenth of `tokens`, then count all of them.

        Args:
          tokens: [N] integers below vocab_size, at least two.
        """
        tokens = np.asarray(tokens, np.int64)
        border = math.ceil(len(tokens) * (1 - _HELD_OUT_FRACTION))
        self._count(tokens[:border])
        self.mixture_C3 = self._fit_mixture(tokens[border - 1 : -1], tokens[border:])
        self._count(tokens)

    def probabilities(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """p(target | context) in float64 for [M] pairs."""
        weights_M3 = self.mixture_C3[self._context_class(contexts)]
        return np.einsum("mi,mi->m", weights_M3, self._components(contexts, targets))

    def _count(self, tokens: np.ndarray) -> None:
        pairs = tokens[:-1] * self._vocab_size + tokens[1:]
        self._pairs, self._pair_counts = np.unique(pairs, return_counts=True)
        self._context_counts = np.bincount(tokens[:-1], minlength=self._vocab_size)
        self._unigram = np.bincount(tokens, minlength=self._vocab_size) / len(tokens)

    def _context_class(self, contexts: np.ndarray) -> np.ndarray:
        return np.frexp(self._context_counts[contexts])[1]

    def _components(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """[M, 3] float64: bigram, unigram and uniform probability of each pair.

        After a context that was never seen, the unigram stands in for the bigram.
        """
        pairs = np.asarray(contexts, np.int64) * self._vocab_size + targets
        found = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        counts = np.where(self._pairs[found] == pairs, self._pair_counts[found], 0)
        seen, unigram = self._context_counts[contexts], self._unigram[targets]
        bigram = np.where(seen > 0, counts / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(pairs), 1 / self._vocab_size)], axis=1)

    def _fit_mixture(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        components_M3, classes = self._components(contexts, targets), self._context_class(contexts)
        # One class more than the largest count needs: the counts grow when the held-out slice is added.
        mixture_C3 = np.full((int(np.frexp(self._context_counts.max())[1]) + 2, 3), 1 / 3)
        for context_class in range(len(mixture_C3)):
            in_class_M3 = components_M3[classes == context_class]
            weights_3 = mixture_C3[max(context_class - 1, 0)]
            for _ in range(_ITERATIONS if len(in_class_M3) else 0):
                share_M3 = in_class_M3 * weights_3
                share_M3 /= share_M3.sum(axis=1, keepdims=True)
                # One pseudo-count spread evenly keeps every weight above zero, so that no target is impossible.
                weights_3 = (share_M3.sum(axis=0) + 1 / 3) / (len(share_M3) + 1)
            mixture_C3[context_class] = weights_3
        return mixture_C3


def bigram_baseline(dataset: Dataset, batches: Iterable[Batch] | None = None) -> BigramResult:
    """Fit on the training tokens, evaluate on the validation targets that a model is evaluated on.

    Args:
      batches: the validation batches; all of them by default. Targets of weight 0 do not count.
    """
    model = BigramModel(dataset.tokenizer.vocab_size)
    model.fit(dataset.train.tokens)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in dataset.validation_batches() if batches is None else batches:
        counted = batch["loss_weights"] > 0
        nats -= float(np.log(model.probabilities(batch["tokens"][counted], batch["targets"][counted])).sum())
        num_tokens += int(counted.sum())
        num_bytes += dataset.num_bytes(batch)
    return BigramResult(nats / num_tokens, nats / math.log(2) / num_bytes)
