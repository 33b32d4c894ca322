"""The method itself: attention, cache, encoder and generator, on torch and transformers alone."""
