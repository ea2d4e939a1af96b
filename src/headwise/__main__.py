"""`python -m headwise` is the command `headwise`, also under `accelerate launch -m headwise`."""

from headwise_command import main

main()
