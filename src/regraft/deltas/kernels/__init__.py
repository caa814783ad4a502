"""The compiled loops: merges, their inverse, how stored values agree or differ."""
