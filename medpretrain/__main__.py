"""`python -m medpretrain`, which is how torchrun starts it."""

from medpretrain.cli import main

main()
