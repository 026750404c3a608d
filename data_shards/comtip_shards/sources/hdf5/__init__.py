"""HDF5 files of strangers: opened after checks of their links, sizes and lengths, and of damage on which the library hangs."""
