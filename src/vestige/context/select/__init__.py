"""Policies that keep every entry of the cache and read few of them, one file each."""
