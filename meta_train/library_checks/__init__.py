"""Checks of the plug-in with the real libraries that it is used in: each raises where something does not work."""
