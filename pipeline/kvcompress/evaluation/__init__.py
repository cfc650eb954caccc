"""What compression costs and what it saves: programs and measures above the library."""
