"""Parts of `python -m experiments.two_hosts`: the link, the processes, what they run, and the report."""
