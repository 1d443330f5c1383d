"""Real weights on real photographs: what pruning costs without training, and what training for it gives back.

``make photographs``, or ``PYTHONPATH=experiments python -m photographs --help``.
"""
