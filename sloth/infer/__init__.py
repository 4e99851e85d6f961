"""Using a model: generation."""
