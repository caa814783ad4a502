"""What each engine would do with an adapter: facts as data, held against an adapter and a base."""
