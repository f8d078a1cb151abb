"""`kvtiers new`: a package of one's own to begin with."""
