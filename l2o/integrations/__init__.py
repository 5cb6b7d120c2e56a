"""Thin adapters to other libraries, one a file; nothing else in l2o imports those."""
