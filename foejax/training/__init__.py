"""Training: optimizer, step, checkpoints and the loop; `foejax.training.loop.train` is the way in."""
