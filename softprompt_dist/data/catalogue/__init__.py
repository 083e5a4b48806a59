"""Tasks whose text, labels and metrics are known by name."""
