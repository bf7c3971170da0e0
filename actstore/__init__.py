"""Activation stores: harvest once, read shuffled shards many times."""
