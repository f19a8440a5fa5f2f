"""Faiss, to compare with."""
