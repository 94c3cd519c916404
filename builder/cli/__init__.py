"""The command line: argparse, printing, exit codes. Nothing below imports this."""
