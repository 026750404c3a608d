"""Loaders (threads, worker processes, DALI), which all return the same batches in the same order.

Tiles that DALI decodes may differ from those of the other loaders by the tolerance of JPEG decoders.
"""
