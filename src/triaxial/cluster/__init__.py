"""What a model is spread on: devices and the tiers of links between them."""
