"""Frozen backbones: loading, sharding, fingerprints and the two shapes behind one interface."""
