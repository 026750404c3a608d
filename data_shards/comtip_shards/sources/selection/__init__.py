"""Selection of the sections of a source, and download of their files from a URL."""
