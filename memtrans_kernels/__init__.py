"""Operators of the memory: ring write, exact search, unit vectors, attention."""
