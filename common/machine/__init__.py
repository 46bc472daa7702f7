"""What this machine has: CPUs and memory, and what other processes use of it."""
