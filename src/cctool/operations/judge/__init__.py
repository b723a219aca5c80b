"""How a network is judged: its task in a command, what may be lost, and what it costs."""
