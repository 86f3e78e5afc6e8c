"""Tenants: authentication, quotas, fair shares and usage accounting.

Knows tenants' names, digests of API keys, tokens and seconds; knows nothing of HTTP, of tensors, or
of which experts a request uses.
"""
