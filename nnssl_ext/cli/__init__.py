"""One thin argparse file per command; heavy imports wait until the arguments are parsed."""
