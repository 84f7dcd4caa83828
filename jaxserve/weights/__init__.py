"""Where weights come from, and how they get onto the devices: `resolve`, then `load_model`."""
