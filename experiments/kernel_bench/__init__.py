"""Races the kernels of `pallas_kernels` against their peers: the parts of `experiments/bench_kernels.py`.

An operation joins with one `Operation` (`operations.py`) in `OPERATIONS` of `experiments/bench_kernels.py`; its file
says which shapes race, how operands are drawn, what the work is and who takes part (`grouped_matmul.py` is the model).
"""
