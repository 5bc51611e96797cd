"""Out of this project's format, into those of others."""
