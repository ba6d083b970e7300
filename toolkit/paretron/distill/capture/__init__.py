"""A teacher asked once: what it says of a text on disk, and read back in its place."""
