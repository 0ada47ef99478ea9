def fla_recurrence(*a, **k):
    return None
