"""The commands: one file per verb, each a Typer signature and a call of its operation."""
