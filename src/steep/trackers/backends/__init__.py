"""Trackers, one file each; the name of the file is the name in `trackers`."""
