"""Low ranks: the best one of a product, and the first factors of PiSSA and OLoRA."""
