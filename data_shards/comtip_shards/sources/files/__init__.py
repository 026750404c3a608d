"""Container formats and file handling shared by the readers: packaging, HDF5 and Zarr checks, tables, GeoJSON."""
