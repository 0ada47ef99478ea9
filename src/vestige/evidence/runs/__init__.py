"""Whole pieces of work from a description in a file: erase and prove it; learn a stream and see what is kept."""
