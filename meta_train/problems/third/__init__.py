"""Forty more, written by somebody who knew neither the rules nor what they miss, while `steered-own` came about."""

from meta_train.problems.third import inverse, likelihoods, nature, rows, series, text, views, vision

__all__ = ["inverse", "likelihoods", "nature", "rows", "series", "text", "views", "vision"]
