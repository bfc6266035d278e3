"""From documents to batches: token shards (`shards`), sequences and batches (`batches`)."""
