"""Accuracies of a policy on sets of problems, in training and by themselves."""
