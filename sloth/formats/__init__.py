"""Files: safetensors folders, the hub, PEFT adapters, GGUF."""
