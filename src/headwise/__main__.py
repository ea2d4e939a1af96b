"""`python -m headwise` is the command `headwise`, also under `accelerate launch -m headwise`."""

from headwise.cli import main

main()
