"""Strategies that split one model over processes: the same numbers, less memory each."""
