"""Dense architectures: built by name, recognised by names and shapes, and noted so that a file can build them again."""
