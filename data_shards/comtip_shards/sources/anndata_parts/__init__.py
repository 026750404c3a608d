"""Elements of an AnnData: access, counts and positions."""
