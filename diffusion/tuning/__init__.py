"""What fine-tuning a base and training a LoRA share: data, buckets, latents, the step, its memory."""
