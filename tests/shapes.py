"""The type checker of the tests' import hook."""

from beartype import BeartypeConf, beartype

# As in PEP 484, an int is a float.
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
