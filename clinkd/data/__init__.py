"""Records, formats, images, collation, caches, the shipped sample set."""
