"""Pure plans: which functions a model is cut into, and what is to be done with sandboxes."""
