"""How the demo voice is made: speech from flite, a small codec on it, then a backbone and a head on its codes."""
