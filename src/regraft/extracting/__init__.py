"""The verb that gets an adapter out of a fine-tuned model."""
