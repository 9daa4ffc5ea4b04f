"""Images: what a set is (manifest), which sample goes where (order), how it is read (stream) and made (shards)."""
