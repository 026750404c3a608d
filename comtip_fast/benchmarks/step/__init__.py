"""``comtip bench step``: a whole training step beside the steps that a user would run instead, in one process."""
