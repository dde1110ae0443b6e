"""Raw text → token shards → batches."""
