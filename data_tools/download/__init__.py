"""Lists of URLs to image shards."""
