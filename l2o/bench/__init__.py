"""Benchmarks: the engine, steps of the plug-in, memory, and the checks and measurements of a GPU."""
