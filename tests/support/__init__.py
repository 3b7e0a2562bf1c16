"""What the tests share: small models, a second statement of the backbones, comparisons, stand-ins for data."""
