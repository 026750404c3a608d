"""Elements of an AnnData: access, libraries, counts, positions, facts and images."""
