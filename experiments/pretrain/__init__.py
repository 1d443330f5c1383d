"""Pre-training on canvas without labels, by replaced patches and by a MASK token, then fine-tuning with few labels.

``make pretrain``, or ``PYTHONPATH=experiments python -m pretrain --help``.
"""
