"""Reflective correction: weak answers, rewritten after the truth, become training data."""
