"""The effect and the cost of quantizing each layer, and the search for a format of each."""
