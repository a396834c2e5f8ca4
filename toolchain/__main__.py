"""`python -m laptop`."""

from laptop.cli import main

main()
