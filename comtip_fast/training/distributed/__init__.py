"""Process groups, communication timing, failures and signals."""
