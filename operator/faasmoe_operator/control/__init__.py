"""Control core: the loop that places and scales a model's functions, and its HTTP API."""
