"""Training of the demo voice: a small codec on flite's speech, then a backbone and a flow head on its codes."""
