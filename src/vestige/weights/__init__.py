"""What the weights retain when they learn something new, and what is gone when they are made to forget."""
