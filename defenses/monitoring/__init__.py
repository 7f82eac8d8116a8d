"""Watch: readings of a defense's health, and alarms."""
