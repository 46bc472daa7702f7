"""What rankers.train is made of: options, pairs, views, the objective."""
