"""Policies to compare with, on equal terms: the same data, windows, normalisation, averaged weights and evaluation."""
