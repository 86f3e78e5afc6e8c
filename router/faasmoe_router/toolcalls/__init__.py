"""Tool calls in a model's text: formats, grammars that enforce them and a streaming parser.

Knows text and JSON schemas; nothing of HTTP or tensors.
"""
