"""What is read: bases of every kind, as plain weights, and what tells them apart."""
