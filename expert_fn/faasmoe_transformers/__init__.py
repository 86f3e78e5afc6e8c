"""Adapter to the private and undocumented API of transformers and torch.

Every name of these libraries that is private, undocumented or not re-exported from a public module
is used in this package only, and is listed in `private_names` with the reason. A release that
changes one of them is followed here and nowhere else.

The package is a leaf: router and sandboxes import it, and it imports neither. What it needs of them
is passed in as callables or described by Protocols that are defined here. It imports torch,
transformers and the standard library; this module imports nothing, so that a sandbox can use
`lazy_import` before torch is imported.
"""
