"""Meshes, layouts and collectives: how a model meets its devices."""

from sharding.layout import Layout
from sharding.mesh import AXES, LayoutKind, MeshSizes, make_mesh, plan_mesh

__all__ = ["AXES", "Layout", "LayoutKind", "MeshSizes", "make_mesh", "plan_mesh"]
