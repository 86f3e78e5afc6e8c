"""Checkpoint preparation: converts a Hugging Face checkpoint into a store; also the demo model.

A store is the folder of files that sandboxes and routers map; `faasmoe_contracts.store` reads it.
Preparation streams: it reads one parameter at a time, applies transformers' own conversion rules
and writes it to its final place, so that memory use does not depend on the checkpoint's size.
"""
