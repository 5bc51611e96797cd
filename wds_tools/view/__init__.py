"""A web page to look at a data set, served on this machine."""
