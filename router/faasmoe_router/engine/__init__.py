"""The engine: text in, text out, over transformers' continuous batching of the router's model."""
