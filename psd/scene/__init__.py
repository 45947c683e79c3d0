"""The 3D scene: cameras, fields, the volume renderer with its losses, meshes, their rasteriser and files, turntables.

World z-up, right-handed, objects face +x. Knows nothing of priors, rewards or methods.
"""
