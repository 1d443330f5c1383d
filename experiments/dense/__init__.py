"""Segmentation of canvas by encoders that drop tokens: what dropping costs in overlap, and what it gains.

``make dense``, or ``PYTHONPATH=experiments python -m dense --help``.
"""
