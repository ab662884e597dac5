"""Side-by-side measurements with peers and with what the parts could do at best."""
