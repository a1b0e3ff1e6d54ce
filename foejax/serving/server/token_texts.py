"""What single tokens look like in log-probabilities."""

from __future__ import annotations

import functools

from foejax.data import Tokenizer


class TokenTexts:
    """Texts of single tokens, special ones by name; bytes that are no character alone are U+FFFD."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer every text is `token_id:ID`."""
        self._tokenizer = tokenizer
        # Some tokenizers drop the blank of the first token of a text, so that every token is read behind another one.
        self._before = tokenizer.encode("a") if tokenizer else []
        self._text_before = tokenizer.decode(self._before, skip_special_tokens=False) if tokenizer else ""
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        together = self._tokenizer.decode([*self._before, token], skip_special_tokens=False)
        return together[len(self._text_before) :]
