"""Modelling code that travels with exported checkpoints, so that serving engines load them."""
