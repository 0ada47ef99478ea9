"""Methods that act on attention itself while a model reads and writes, one file each."""
