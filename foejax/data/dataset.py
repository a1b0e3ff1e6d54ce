"""From a data config to batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foejax.config import DataConfig
from foejax.data.documents import read_documents
from foejax.data.encoding import TokenStream, encode_corpus
from foejax.data.errors import DataError
from foejax.data.loader import TrainIterator, validation_batches
from foejax.data.packing import Batch, PackedRows
from foejax.data.split import Part, Split, choose_split, scan, split_documents
from foejax.data.tokenizer import Tokenizer, train_bpe, training_version
from pallas_kernels.disk_cache import cache_folder


class Dataset:
    """A tokenised corpus, split, and ready to be iterated.

    Attributes:
      config: the data config that it was made from.
      tokenizer: of the corpus.
      train, validation: the token streams.
      fingerprint: names the stream of training batches; equal fingerprints mean equal batches.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, train: TokenStream, validation: TokenStream, fingerprint: str
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation
        self.fingerprint = fingerprint
        self._train_rows = PackedRows(train, config.sequence_length, config.seed)
        self._validation_rows = PackedRows(validation, config.sequence_length, seed=None)

    def train_iterator(self, process_index: int = 0, process_count: int = 1, accumulation: int = 1) -> TrainIterator:
        """Endless shuffled batches; a process gets its rows of every global batch, [B / process_count, T] a field.

        With `accumulation` micro-batches these are its rows of the first one, then of the second one, and so on.
        """
        size = self.config.batch_size
        return TrainIterator(self._train_rows, size, self.fingerprint, process_index, process_count, accumulation)

    def validation_batches(
        self, batch_size: int | None = None, limit: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """The held-out text in order, from its beginning at every call; at most `limit` batches."""
        size = batch_size or self.config.batch_size
        return validation_batches(self._validation_rows, size, limit, process_index, process_count)

    @property
    def num_train_tokens(self) -> int:
        """Targets of one training epoch."""
        return len(self.train)

    @property
    def num_validation_tokens(self) -> int:
        """Targets of one pass over the held-out text."""
        return len(self.validation)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [V]."""
        return self.tokenizer.token_byte_lengths()

    def num_bytes(self, batch: Batch) -> int:
        """UTF-8 bytes that the weighted targets of a batch stand for.

        Bits per byte over any set of batches are (total nats / ln 2) / (total bytes).
        """
        return int(self.token_byte_lengths[np.asarray(batch["targets"])][np.asarray(batch["loss_weights"]) > 0].sum())

    @cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a target over the whole held-out text, the end-of-text targets counted as tokens of 0 bytes."""
        counts = np.bincount(self.validation.tokens, minlength=self.tokenizer.vocab_size)
        return float(counts @ self.token_byte_lengths) / len(self.validation)


def open_dataset(config: DataConfig, *, vocab_size: int | None = None) -> Dataset:
    """Fetch, split, tokenise and open a corpus; every step is cached.

    Args:
      vocab_size: rows of the model's embedding; a larger tokenizer is refused.

    Raises:
      DataError: see `read_documents`, `load_tokenizer` and `split_documents`.
    """
    corpus = _split_corpus(config)
    tokenizer = _open_tokenizer(config, corpus)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={vocab_size}: "
            "choose a larger model.vocab_size or a smaller tokenizer"
        )
    stream_key = _digest(corpus.key, tokenizer.digest())
    streams = encode_corpus(corpus.texts(), tokenizer, cache_folder("encoded", stream_key))
    fingerprint = _digest(stream_key, config.sequence_length, config.batch_size, config.seed)[:16]
    return Dataset(config, tokenizer, streams["train"], streams["validation"], fingerprint)


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that a config asks for; a BPE is trained on the training documents, or found in the cache.

    Raises:
      DataError: no such tokenizer file, a broken one, or a vocabulary without room for all bytes.
    """
    return _open_tokenizer(config, _split_corpus(config))


@dataclass(frozen=True)
class _SplitCorpus:
    config: DataConfig
    split: Split
    key: str  # names the texts of both parts

    def texts(self) -> Iterator[tuple[Part, str]]:
        return split_documents(read_documents(self.config.corpus, self.config.text_field), self.split)


def _split_corpus(config: DataConfig) -> _SplitCorpus:
    sizes, text_digest = scan(read_documents(config.corpus, config.text_field))
    split = choose_split(sizes, config.validation_fraction, config.seed)
    return _SplitCorpus(
        config, split, _digest(text_digest, sorted(split.validation), split.tail_of, split.tail_fraction)
    )


def _open_tokenizer(config: DataConfig, corpus: _SplitCorpus) -> Tokenizer:
    if config.tokenizer != "bpe":
        return Tokenizer.from_file(config.tokenizer)
    key = _digest(corpus.key, config.tokenizer_vocab_size, training_version())
    train_texts = (text for part, text in corpus.texts() if part == "train")
    return train_bpe(train_texts, config.tokenizer_vocab_size, cache_folder("tokenizers", key))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:32]
