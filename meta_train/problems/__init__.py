"""Small training problems as users write them, in plain PyTorch, by kind; ``PROBLEMS`` has all of them by name."""

from meta_train.problems import embeddings, functions, generative, images, physics, pictures, sequences, tables, words
from meta_train.problems.common import PROBLEMS, Begun, Problem

__all__ = ["KINDS", "PROBLEMS", "Begun", "Problem"]

KINDS = (embeddings, functions, generative, images, physics, pictures, sequences, tables, words)
"""The modules, each of which enters its problems as it is imported."""
