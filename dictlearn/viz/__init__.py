"""Figures of stores and dictionaries; every function draws into the Axes it is given."""
