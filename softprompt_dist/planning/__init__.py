"""What a run will need and how fast it will be, from a model's numbers alone."""
