"""The viewer: a static site of what the latents of dictionaries stand for."""
