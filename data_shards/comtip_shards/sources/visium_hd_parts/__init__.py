"""Helpers of the Visium HD reader, which find the files of a section, read its scale, and pool bins in blocks or cells in squares."""
