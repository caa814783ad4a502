"""What the demo does, a file each: data, training, merging, measuring, comparing."""
