"""Text-to-image diffusion on diffusers: a base of our own in Taiyi's layout, fine-tuning, LoRA, inference."""
