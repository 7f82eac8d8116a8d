"""Activation Profiles: where on its way through the layers an image leaves its class."""
