"""Measuring: calls in turn, models at several densities, and the same pruning in plain torch beside them."""
