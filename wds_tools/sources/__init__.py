"""What records hold, whatever file they come from: what conversions and JsonlDataset share."""
