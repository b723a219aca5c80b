"""One frozen dataclass per verb: names, defaults and checks. Standard library only."""
