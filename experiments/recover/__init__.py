"""Prune and recover on a dense task: where a digit is in every frame of a short sequence."""
