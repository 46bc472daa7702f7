"""Bookkeeping every part shares: options, checkpoints, processes, the loop, optimizers, logs, pictures.

Knows torch and Pillow; knows nothing of models or of data.
"""
