"""Files: safetensors folders, single tensor files, the hub, PEFT adapters, GGUF."""
