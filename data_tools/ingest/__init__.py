"""What all makers of shards share: records, a journal, the steps of one image on its way into a shard."""
