"""Load on a serving engine: traces of requests, runners that send them, and what their users would have seen."""
