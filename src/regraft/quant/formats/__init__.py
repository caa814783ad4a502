"""One file per format of quantized weights: how codes are read and, where regraft can, made."""
