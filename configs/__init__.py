"""Select: Hydra groups, one YAML a choice."""
