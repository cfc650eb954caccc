"""kvcompress: measure what every attention head of a causal language model does, and keep only the KV cache it needs.

Facts flow one way: attention sums -> head statistics -> classes -> retention plan -> compressed cache -> reports.
Importing this package imports nothing heavy; the parts are `kvcompress.analysis` and `kvcompress.methods`.
"""

__version__ = "0.1.0"
