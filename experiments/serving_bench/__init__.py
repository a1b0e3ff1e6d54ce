"""Pieces of `experiments.bench_serving`: contenders in processes of their own, the profile of ours, the report."""
