"""Helpers of the Xenium reader, which find the files of a section, read its pixel size and panel, and pool transcripts or cells in squares."""
