"""Ways to show a result: the terminal."""
