"""Federation of Experts, expert parallelism and Head Parallel side by side; see `__main__`."""
