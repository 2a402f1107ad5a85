"""Recipes read from configurations of other frameworks: United Perception."""
