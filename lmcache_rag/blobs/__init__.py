"""Named immutable bytes."""
