"""The processes of a run: launching them, what they say to each other, and sharding a model among them."""
