"""Policies that drop entries of the cache, one file each."""
