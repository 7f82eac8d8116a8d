"""The structure of a network, and how to run it cheaply."""
