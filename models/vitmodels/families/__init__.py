"""One file a model family; every module in this folder is found by scanning."""
