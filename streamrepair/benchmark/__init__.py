"""Backends timed on the user's own device, against the plain way in memory and a float64 SVD. Nothing is written."""
