"""What is computed in a forward pass: hooks, scopes, selections, and each kind of layer."""
