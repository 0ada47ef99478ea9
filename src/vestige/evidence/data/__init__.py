"""Texts and data sets that are there without a network."""
