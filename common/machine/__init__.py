"""What this machine has: CPUs, memory, other nodes, and what others use of it."""
