"""Compute kernels: one folder per operation, every backend behind one function.

An operation and its folder share their name, and the function wins: write `from pallas_kernels import grouped_matmul`
for the function and `from pallas_kernels.grouped_matmul.shapes import SHAPES` for something else of the folder.
"""

from pallas_kernels.combine.api import combine
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_swiglu.api import grouped_swiglu
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.projected_topk.api import projected_topk
from pallas_kernels.routing_topk.api import routing_topk

__all__ = ["combine", "grouped_matmul", "grouped_swiglu", "paged_attention", "projected_topk", "routing_topk"]
