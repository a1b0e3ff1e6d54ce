"""Grouped SwiGLU for the CPU: that of `xla.py` around the CPU's grouped matmul."""

from __future__ import annotations

import functools

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.grouped_swiglu import xla

swiglu = functools.partial(xla.swiglu, matmul=cpu.matmul)
