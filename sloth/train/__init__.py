"""Training: settings, data, the loop, optimizer, schedule, checkpoints, log."""
