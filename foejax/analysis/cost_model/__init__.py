"""What a step takes on a cluster that is not here: compute by rooflines, communication by latency and bandwidth."""
