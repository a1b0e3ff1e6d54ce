"""Each token's k best experts from what their scores are made of: see `api.py`, and `docs/routing_kernels.md`."""
