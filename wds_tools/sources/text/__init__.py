"""Records in text: lines and JSON lists, plain or compressed."""
