"""Training of all weights on plain text: engine, optimizers, checkpoints, export, measures."""
