"""Formats shared by the router, the sandboxes and the operator.

Wire frames, the store format, the routing table and control messages. Depends only on the standard
library and numpy, never on another FaaSMoE package.
"""
