"""What adapters do as a model runs: to a layer's output, or to the weights it runs on."""
