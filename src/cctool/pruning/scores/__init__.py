"""How much a unit or a weight matters."""
