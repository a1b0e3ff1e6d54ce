"""Parts of `python -m experiments.communication_report`."""
