"""What measuring and compressing costs and saves: speed, memory, quality."""
