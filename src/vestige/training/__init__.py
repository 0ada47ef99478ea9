"""Training: how models come to their weights, and what that costs."""
