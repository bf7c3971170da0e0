"""Named, readable and editable sites over unmodified vision transformers."""
