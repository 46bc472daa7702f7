"""ControlNet: the network, its data, its training step, its pipeline."""
