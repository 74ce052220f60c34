"""Run folders: atomic write, safe read, which file a path means, locking."""
