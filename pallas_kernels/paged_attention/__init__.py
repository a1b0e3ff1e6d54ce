"""Attention over keys and values in blocks that sequences hold by number."""
