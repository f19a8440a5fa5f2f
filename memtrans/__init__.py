"""Memorizing Transformers with an exact, device-resident memory."""
