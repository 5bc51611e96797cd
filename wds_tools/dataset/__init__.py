"""A dataset as a whole: a directory or object-store prefix of shards with a manifest."""
