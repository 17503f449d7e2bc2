"""A package of its own: a folder `tests` that some installed project left behind is not taken for it."""
