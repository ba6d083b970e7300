"""What a device can do, and how near a model comes to it."""
