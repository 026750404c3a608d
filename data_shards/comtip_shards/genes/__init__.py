"""Gene identifiers and the table that maps them to one key."""
