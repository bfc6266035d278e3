"""From sources to batches: documents (`sources`), token shards (`shards`), batches (`batches`)."""
