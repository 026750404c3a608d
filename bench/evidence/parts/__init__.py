"""One module per part; its ``run(rows, dry)`` measures and sends the rows, on a GPU or, with ``dry``, on the CPU."""
