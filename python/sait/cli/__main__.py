"""``python -m sait.cli``: what torchrun starts."""

from sait.cli import main

main()
