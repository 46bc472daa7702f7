"""What train_dalle.py is made of: options, data, captions, line drawings, the stages before it."""
