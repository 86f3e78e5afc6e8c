"""The control core: the loop that keeps functions where they are wanted, and its HTTP API."""
