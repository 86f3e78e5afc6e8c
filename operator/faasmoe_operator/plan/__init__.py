"""Pure planning: a model's functions, and the actions on its sandboxes."""
