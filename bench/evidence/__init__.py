"""Evidence from one GPU: the parts of ``bench/gpu_evidence.py``, each run in its own process."""
