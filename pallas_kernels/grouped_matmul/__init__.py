"""Grouped (ragged) matrix multiplication: see `api.py` for the function, `docs/grouped_matmul.md` for how to use it."""
