"""Choice of each token's k best experts: see `api.py` for the function, `docs/routing_kernels.md` for its use."""
