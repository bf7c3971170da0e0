"""Dictionaries on disk: the native format, and those of other libraries."""

from dictlearn.formats.native import load, save

__all__ = ["load", "save"]
