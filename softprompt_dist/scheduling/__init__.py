"""Batch jobs of a pipeline under Slurm: what is submitted, how far it is, whether it can work."""
