"""The model that trains in minutes on a CPU."""
