"""A run: its folder, records, console, processes and hardware."""
