"""What diffusion.train_base is made of: autoencoder, latents, text encoder and UNet from scratch."""
