"""Training: the CoMTIP task (model, data, losses), and a loop that runs any task."""
