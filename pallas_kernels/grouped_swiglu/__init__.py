"""The gated half of SwiGLU experts in one operation: see `api.py`."""
