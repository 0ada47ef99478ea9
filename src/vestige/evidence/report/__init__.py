"""Reports: self-contained pages and their figures, made from ledger frames."""
