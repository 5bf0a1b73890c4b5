"""Keys of facts, and the second moment of all keys that an update keeps."""
