"""The words typed: Typer alone."""
