"""Who gets how much: budgets that differ between layers and heads."""
