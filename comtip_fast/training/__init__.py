"""The task (model, data, losses) and the loop that runs any task."""
