"""Checkpoints: a folder with θ and its card; those that come with l2o, and those at an address."""
