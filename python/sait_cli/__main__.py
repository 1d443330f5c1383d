"""``python -m sait_cli``: what torchrun starts."""

from sait_cli import main

main()
