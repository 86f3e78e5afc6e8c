"""Adapter on transformers' continuous batching and model code."""
