"""Forty problems of other kinds than the first, written by somebody who knew neither the rules nor what they miss."""

from meta_train.problems.second import classifiers, densities, language, regressions, scenes, science

__all__ = ["classifiers", "densities", "language", "regressions", "scenes", "science"]
