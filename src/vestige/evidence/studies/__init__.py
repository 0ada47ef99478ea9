"""Studies: findings of papers, looked for again at a scale that a laptop can do."""
