"""One module per part: ``run(rows, dry)`` measures it, and sends rows."""
