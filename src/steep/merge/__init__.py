"""Models made of models: linear combinations of weights. In: model folders. Out: a folder that transformers loads."""
