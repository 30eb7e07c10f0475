"""Providers of sandboxes: the contract (`base.py`), the registry, one adapter each."""
