"""Studies: many runs from one YAML, compared with statistics."""
