"""Checkpoints: the store on disk, the asynchronous writer and the state of a run."""
