"""Blocks of a store over the network: a server beside the store, and a cache where it is not.

Imports neither torch nor the functions, so that a server is a small process.
"""
