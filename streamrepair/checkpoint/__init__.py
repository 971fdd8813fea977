"""Checkpoints on disk: headers, layouts, pairing, panels in and out, durability. No mathematics."""
