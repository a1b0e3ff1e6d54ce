"""Commands over a trained model: evaluate, generate, logits, export, import."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from foejax.config import ConfigError


def run_evaluate(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print loss, perplexity and bits per byte."""
    from foejax.api import load

    found = load(options.folder, devices=options.devices or 0, overrides=overrides).evaluate(options.batches)
    if options.json:
        figures = {name: getattr(found, name) for name in ("loss", "bits_per_byte", "num_tokens", "num_bytes")}
        perplexity = found.perplexity if math.isfinite(found.perplexity) else None
        print(json.dumps(figures | {"perplexity": perplexity}))
        return
    print(
        f"loss {found.loss:.4f} nats/token, perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits per byte "
        f"({found.num_tokens:,} tokens, {found.num_bytes:,} bytes)"
    )


def run_generate(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print each prompt with its continuation."""
    from foejax.api import load

    loaded = load(options.folder, devices=options.devices or 0, overrides=overrides)
    texts = loaded.generate(
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print("\n\n".join(prompt + text for prompt, text in zip(options.prompt, texts, strict=True)))


def run_logits(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Write the logits of one sequence as float32 [T, V]."""
    tokens = _read_tokens(options.tokens)
    import jax
    import numpy as np

    from foejax.api import load

    loaded = load(options.folder, devices=options.devices or 0, dtype="float32", overrides=overrides)
    # GPUs would otherwise round the operands of float32 matmuls to a shorter format.
    with jax.default_matmul_precision("highest"):
        logits = loaded.logits(tokens)
    with open(options.out, "wb") as file:  # np.save would add .npy to a name without it
        np.save(file, logits.astype(np.float32))
    print(f"{options.out}: float32 {list(logits.shape)}")


def run_export(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Write a Hugging Face folder."""
    from foejax.api import export

    kinds = {"model_type": options.model_type, "dtype": options.dtype}
    out = export(options.run_dir, options.out, devices=options.devices or 0, **kinds)
    print(f"{options.run_dir} exported to {out}")


def run_import(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Make a run of a Hugging Face folder."""
    from foejax.api import import_folder

    import_folder(options.source, options.out, overrides)
    config = Path(options.out) / "config.yaml"
    print(f"{options.source} imported; train on with `foejax train {config} --run-dir {options.out}`")


def _read_tokens(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--tokens={text!r} is not a list of token ids: write for example --tokens 1,2,3") from None
