"""What turns losses into updated weights: one process or several, DeepSpeed; Muon."""
