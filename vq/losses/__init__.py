"""What a reconstruction is compared by: pixels, features of networks, an adversary."""
