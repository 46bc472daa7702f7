"""Measuring every arm the same way: metrics, judges, prompts, reports. Imports all, is imported by none."""
