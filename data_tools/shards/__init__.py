"""Image and token shards: written whole, indexed, read in an order that is a pure function of (seed, epoch)."""
