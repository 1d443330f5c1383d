"""Models that leave: a sparse model as a program of another engine."""
