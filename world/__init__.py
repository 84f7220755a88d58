"""Scenes of our own: geometry, light, camera, and questions whose answers are computed from them."""
