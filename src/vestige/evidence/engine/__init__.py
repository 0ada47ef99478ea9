"""Measuring in cells: what an audit and a comparison share.

A cell is one measurement under a key made of all that it depends on; a ledger that has the key is not asked to measure
it again. Cells that one reading of a text serves are a job, and an engine runs jobs: in this process
(:mod:`vestige.evidence.engine.local`) or on Ray (:mod:`vestige.evidence.engine.ray`).
"""
