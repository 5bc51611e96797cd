"""A web page to look at a dataset, served on this machine."""
