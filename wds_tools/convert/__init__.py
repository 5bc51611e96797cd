"""Source records -> samples: image-text pairs, DCLM documents."""
