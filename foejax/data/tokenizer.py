"""Byte-level BPE: trained on the training documents and cached, or read from a tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from foejax.data.errors import DataError
from foejax.data.storage import atomic_folder, progress_bar

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|return|>")
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end token


class Tokenizer:
    """A text <-> token id mapping with one end-of-text token.

    `eos_id` opens every document as an input and closes it as a target. Special tokens written out in a text are
    read as ordinary text.

    Raises:
      DataError: the tokenizer has no end-of-text token under a usual name.

    Attributes:
      special_tokens: ids by text.
    """

    def __init__(self, backend: HuggingFaceTokenizer) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        name = next((name for name in _END_NAMES if name in vocabulary), None)
        if name is None:
            raise DataError(f"the tokenizer has no end-of-text token: add one named {' or '.join(_END_NAMES[:2])}")
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.eos_id: int = vocabulary[name]
        self.vocab_size: int = max(vocabulary.values()) + 1
        added = backend.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {token.content: index for index, token in added.items() if token.special}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
          DataError: no such file, or not a tokenizer.
        """
        if not Path(path).is_file():
            raise DataError(f"data.tokenizer={str(path)!r} is not a file: give `bpe` or the path of a tokenizer.json")
        try:
            return cls(HuggingFaceTokenizer.from_file(str(path)))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise DataError(f"{path} is not a tokenizer.json ({error}): copy it again") from error

    def to_file(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        Path(path).write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str, *, start_of_document: bool = False) -> list[int]:
        """Token ids of a text; with `start_of_document`, led by `eos_id` as every training document is."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.eos_id, *ids] if start_of_document else ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Token ids of a text whose special tokens are written out, as chat templates write them."""
        return self._special_backend.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _special_backend(self) -> HuggingFaceTokenizer:
        backend = HuggingFaceTokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, encoded in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def digest(self) -> str:
        """A sha256 of the whole tokenizer, for cache names."""
        return hashlib.sha256(self._backend.to_str().encode("utf-8")).hexdigest()

    def token_byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [vocab_size]; special tokens count 0.

        Exact for byte-level BPE. SentencePiece-like tokenizers may add one blank to a document, which counts.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        byte_level = '"ByteLevel"' in self._backend.to_str()
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token) if byte_level else _sentencepiece_bytes(token)
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode("utf-8"))
        lengths[self.eos_id] = 0
        return lengths


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int32 [V]; special tokens, `eos_id` among them, count 0."""
    return tokenizer.token_byte_lengths()


def train_bpe(texts: Iterable[str], vocab_size: int, cache: Path | None = None) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
      texts: training documents.
      vocab_size: size of the vocabulary, the 256 bytes and `<|endoftext|>` (id 0) included; a short text gives fewer.
      cache: a folder that holds, or will hold, `tokenizer.json` for exactly these texts and this size.

    Raises:
      DataError: vocab_size has no room for the bytes.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(
            f"data.tokenizer_vocab_size={vocab_size} has no room for all bytes and the end token: "
            f"choose at least {_SMALLEST_VOCABULARY}"
        )
    if cache is not None and cache.is_dir():
        return Tokenizer.from_file(cache / "tokenizer.json")
    backend = HuggingFaceTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress_bar() as progress:
        progress.add_task("training the tokenizer", total=None)
        backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend)
    if cache is not None:
        with atomic_folder(cache) as folder:
            tokenizer.to_file(folder / "tokenizer.json")
    return tokenizer


def training_version() -> str:
    """What besides text and size decides a trained tokenizer."""
    return f"byte-level-bpe-1-tokenizers-{tokenizers.__version__}"


def _sentencepiece_bytes(token: str) -> int:
    return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode("utf-8"))
