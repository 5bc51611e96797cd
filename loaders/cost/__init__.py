"""What a run will cost, from manifests alone."""
