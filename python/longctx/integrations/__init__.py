"""Adapters to other libraries. None of them is imported before it is used."""
