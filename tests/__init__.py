"""A package, so that no other distribution's `tests` (verl installs one) is taken for it."""
