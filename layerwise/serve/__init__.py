"""The inference engine, whose unit is the layer, and its HTTP server."""
