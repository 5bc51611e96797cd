"""What records hold: texts, images, conversations, codes, and which field is what."""
