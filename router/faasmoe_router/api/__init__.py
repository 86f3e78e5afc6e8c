"""The OpenAI-compatible HTTP API; knows requests and responses, nothing of tensors."""
