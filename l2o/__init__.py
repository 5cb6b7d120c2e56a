"""l2o: meta-train, ship and use learned optimizers in PyTorch."""
