"""The loops for every CPU of the architecture."""
include "_loops.pxi"
