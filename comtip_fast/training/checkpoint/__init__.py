"""Checkpoints: the store on disk, the asynchronous writer, the state of a run, and the choice of a checkpoint to resume from."""
