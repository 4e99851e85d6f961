"""Text in and out of models: tokenizers and chat templates."""
