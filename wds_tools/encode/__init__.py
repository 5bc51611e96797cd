"""Images -> codes: of the samples of a dataset, or of those that a conversion makes."""
