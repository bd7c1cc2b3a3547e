"""A pretrained model on two cores: its steps, its engines, its training and its entropies."""
