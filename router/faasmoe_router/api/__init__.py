"""The OpenAI-compatible HTTP API: validates requests, formats responses; knows no tensors."""
