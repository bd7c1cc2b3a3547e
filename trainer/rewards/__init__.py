"""Rewards: verdicts on responses, by processes that may hang or crash, and terms beside them."""
