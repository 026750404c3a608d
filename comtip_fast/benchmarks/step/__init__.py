"""``comtip bench step``: a whole training step compared with the steps that a user would run instead, in one process."""
