"""Evidence from one GPU: the parts of ``bench/gpu_evidence.py``, each run in a process of its own."""
