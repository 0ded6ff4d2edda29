"""Models: find one, load it, see its layer stack, view it without some layers, cut it."""
