"""Real weights on real photographs: what pruning costs without training, and what fine-tuning recovers.

``make photographs``, or ``PYTHONPATH=experiments python -m photographs --help``.
"""
