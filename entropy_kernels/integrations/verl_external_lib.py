"""Importing this module patches verl with the paper's settings.

It is for `actor_rollout_ref.model.external_lib`, which verl imports in each of Ray's workers before
it builds a model. For other settings, name a module of one's own that calls `patch_verl`.
"""

from .verl import patch_verl

patch_verl()
