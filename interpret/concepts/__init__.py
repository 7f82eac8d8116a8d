"""Concepts: what units detect, and what that has to do with the attack."""
