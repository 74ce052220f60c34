"""One token as fast as the device allows."""
