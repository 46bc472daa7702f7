"""Networks and rules that name what an image shows."""
