"""A model folder, and what is probed and set on the model it holds."""
