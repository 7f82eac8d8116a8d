"""Pictures by matplotlib, and tables as text."""
