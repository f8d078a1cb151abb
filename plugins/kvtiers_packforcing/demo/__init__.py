"""`kvtiers demo video`: what memories make of one walk through the tiny world, side by side."""
