"""Tenants: who calls, what each may ask for, whose turn it is, and what each has used.

Knows names, keys' digests, tokens and seconds; knows nothing of HTTP, of tensors, or of which
experts a request hits.
"""
