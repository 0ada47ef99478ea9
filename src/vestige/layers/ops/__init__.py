"""Kernels: each with a portable form, and a Triton form where that pays."""
