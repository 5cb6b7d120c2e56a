"""Fused versions of whole updates and gradients for the CPU, in C++; the formulas are those of rules and tasks.

Each function here takes all lanes at once and returns None where its kernel does not fit or cannot be had.
"""
