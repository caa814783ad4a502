"""What an undo keeps of a matrix, unit by unit, and how those bytes are laid out."""
