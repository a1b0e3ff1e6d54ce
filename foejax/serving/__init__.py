"""The serving engine: continuous batching of many requests over one model, FoE or MoE alike."""
