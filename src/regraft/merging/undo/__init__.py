"""What a merge keeps of its base, and the way back."""
