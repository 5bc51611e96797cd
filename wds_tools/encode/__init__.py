"""The encoding pass: fills the codes of a data set's images."""
