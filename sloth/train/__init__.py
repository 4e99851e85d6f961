"""Training: settings, the loop, optimizer, schedule, checkpoints, log."""
