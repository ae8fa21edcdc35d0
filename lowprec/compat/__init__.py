"""Other libraries' interfaces on this one: scripts that were written for apex.amp, and how to move them over."""
