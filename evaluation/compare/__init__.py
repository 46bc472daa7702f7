"""Systems, what they cost, and the pages that compare them."""
