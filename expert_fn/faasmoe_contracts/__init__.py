"""What crosses process borders: wire frames, the store format, the routing table, control messages.

Imports the standard library and numpy only, and no other package of FaaSMoE.
"""
