"""Implementations of the operators, by backend; no two import each other."""
