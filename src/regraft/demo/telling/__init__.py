"""What the demo tells its reader: figures, sections, the result."""
