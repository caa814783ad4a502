"""Live models: adapters on a torch model that is running. The one room that needs torch."""
