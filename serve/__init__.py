"""What stands between the models and people who never open a terminal."""
