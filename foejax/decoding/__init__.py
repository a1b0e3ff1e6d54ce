"""Jitted prefill and decoding with a key/value cache split by group."""

from foejax.decoding.generate import generate
from foejax.decoding.sampling import Sampling
from foejax.decoding.steps import decode_step, lower_decode_step, prefill

__all__ = ["Sampling", "decode_step", "generate", "lower_decode_step", "prefill"]
