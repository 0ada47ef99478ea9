"""Policies that keep entries in fewer channels or fewer bits, one file each; they go with one that drops entries."""
