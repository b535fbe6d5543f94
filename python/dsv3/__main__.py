"""`python -m dsv3` is `dsv3`."""

from dsv3.cli import main

main()
