"""The encoding pass: fills the codes of a dataset's images."""
