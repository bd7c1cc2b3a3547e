"""Thin adapters to other people's trainers and models, each a page; import the one you need."""
