"""LoRA adapters and the layouts of their files."""
