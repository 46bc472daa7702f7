"""BriVL (WenLan): the model, and the ranker on it."""
