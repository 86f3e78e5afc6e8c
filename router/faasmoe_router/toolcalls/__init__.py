"""Calls of a client's tools in a model's text: their forms, holding a text to them, reading them.

Knows text and JSON schemas; nothing of HTTP and nothing of tensors.
"""
