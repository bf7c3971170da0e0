"""Sparse autoencoders, transcoders and crosscoders trained off activation stores."""
