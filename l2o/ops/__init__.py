"""The numerics that rules are composed of. Every formula has its one definition here.

Arrays of several values an entry (moments of several decays, features, hidden units) have that axis **first**, so that
each channel is contiguous: ``[channels, *shape]`` for a tensor, ``[channels, entries]`` where networks read them.
"""
