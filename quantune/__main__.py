"""`python -m quantune`."""

from quantune.cli import main

main()
