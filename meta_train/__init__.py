"""The commands: ``python -m meta_train`` and ``python -m meta_train.evaluate``."""
