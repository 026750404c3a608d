"""Which sections of a source are read, and which files of a URL are fetched for them."""
