"""Graph rewrites for a runtime or a camera."""
