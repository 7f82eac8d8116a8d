"""Attacks: a net, images and labels in, adversarial images out."""
