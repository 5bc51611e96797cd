"""What stores that are not a disk have in common: requests and their retries, what errors mean, what takes long, keys."""
