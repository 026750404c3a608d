"""Access to local and remote storage, and the cache of remote files."""
