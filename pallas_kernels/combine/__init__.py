"""Weighted sum of each token's expert rows: see `api.py` for the function, `docs/routing_kernels.md` for its use."""
