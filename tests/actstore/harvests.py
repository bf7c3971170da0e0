"""Harvests of digits with the fake model, for the tests of harvesting."""

import torch
from fake_model import FakeModel

import actstore

SITES = "blocks.{1,3}.resid_post,blocks.2.pattern,logits"


def run(out, **options):
    events = []
    options = {"data": "digits", "sites": SITES, "limit": 100, "batch_size": 8, **options}
    model = options.pop("model", None) or FakeModel()
    store = actstore.harvest(model=model, out=out, on_event=events.append, **options)
    return store, events


def direct(model, source, positions, sites):
    """Return the values of items by a plain forward pass."""
    x = torch.stack([model.transform(source.image(i)) for i in positions])
    return model.run(x, sites=sites)
