"""How a journey is started: here, under torchrun, on Ray. The only package that knows Ray."""
