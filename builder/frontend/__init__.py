"""Text to a typed Containerfile; pure, no I/O."""
